# The command line and the app in a container.
#
#   docker build --tag dora-diffusion .
#   docker build --tag dora-diffusion:cuda --build-arg TORCH=cu128 .
#
# The app, at http://127.0.0.1:7860 with the name and password that you choose:
#
#   docker run --rm -p 127.0.0.1:7860:7860 -v dora-runs:/work/runs -e DORA_DIFFUSION_AUTH=me:eight-letters dora-diffusion
#
# A command, with this folder's photos and a GPU:
#
#   docker run --rm --gpus all --no-healthcheck -v "$PWD:/work" dora-diffusion:cuda train --config settings.yaml
#
# A server, with the extra that it needs (docs/howto/serve.md has a compose file):
#
#   docker build --tag dora-diffusion:serve --build-arg TORCH=cu128 --build-arg EXTRAS=ray .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Which build of torch: cpu, or one for an NVIDIA GPU such as cu128.
ARG TORCH=cpu
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" "torch>=2.6"

WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY samples samples
COPY dora_diffusion dora_diffusion
# Which extras of the package, such as ray,heic.
ARG EXTRAS=""
# Whatever user id runs it may write there, and torch asks for a name.
RUN pip install --no-cache-dir ".${EXTRAS:+[$EXTRAS]}" \
    && useradd --no-create-home --uid 1000 dora \
    && install --directory --owner=dora --mode=1777 \
        /home/dora /home/dora/.cache /home/dora/.cache/huggingface /work /work/runs

USER 1000
ENV HOME=/home/dora USER=dora HF_HOME=/home/dora/.cache/huggingface
WORKDIR /work
EXPOSE 7860
# Of the app. A login page is an answer too.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/').read()"]
ENTRYPOINT ["dora-diffusion"]
CMD ["app", "--host", "0.0.0.0", "--port", "7860", "--runs_dir", "/work/runs"]
