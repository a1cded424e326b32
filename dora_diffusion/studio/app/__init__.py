"""The Gradio app: five tabs over what `dora_diffusion.studio.jobs` does.

Only `dora_diffusion.studio.app.views` and `page` import Gradio. What the page shows of runs is
read from the runs folder by `dora_diffusion.studio.jobs.snapshot.snapshot`.
"""
