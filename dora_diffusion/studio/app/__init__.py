"""The Gradio app: four tabs on top of `dora_diffusion.studio.jobs`.

Only `dora_diffusion.studio.app.views` and `page` import Gradio. The page gets its runs from
`dora_diffusion.studio.jobs.snapshot.snapshot`, which reads the runs folder.
"""
