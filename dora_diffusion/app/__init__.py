"""The Gradio app: four tabs over the same functions as the command line.

Only the modules in `dora_diffusion.app.views` and `page` import Gradio. Training and merging run in
`dora_diffusion.jobs.worker` processes; what the page shows is read from the runs folder by
`dora_diffusion.jobs.snapshot.snapshot`.
"""
