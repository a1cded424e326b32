"""The look: a theme of the system's own fonts (nothing is fetched) and one warm accent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = f"""<meta name="color-scheme" content="light dark">
<style>{Path(__file__).with_name("phone.css").read_text(encoding="utf-8")}</style>"""
SANS = ("Inter", "ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")


def make_theme() -> Any:
    """The Gradio theme; `style.css` does the rest."""
    import gradio as gr

    persimmon = gr.themes.Color(
        c50="#fff5ef", c100="#ffe6d8", c200="#ffc9ae", c300="#ffa57d", c400="#f97c4b",
        c500="#e35d2b", c600="#c4471a", c700="#a03816", c800="#7f2e15", c900="#672714",
        c950="#3a1107", name="persimmon",
    )  # fmt: skip
    return gr.themes.Base(
        primary_hue=persimmon,
        secondary_hue=persimmon,
        neutral_hue="stone",
        radius_size="lg",
        font=SANS,
        font_mono=MONO,
    ).set(
        body_background_fill="#f6f4f0",
        body_background_fill_dark="#171412",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#211d1a",
        background_fill_secondary="#faf9f6",
        background_fill_secondary_dark="#1c1816",
        # Fields stand on the page itself: no box around each of them.
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_padding="0px",
        block_border_color="#e7e2da",
        block_border_color_dark="#38322d",
        border_color_primary="#e7e2da",
        border_color_primary_dark="#38322d",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="#6b6259",
        block_label_text_color_dark="#b3a89c",
        block_title_text_weight="600",
        block_shadow="none",
        input_background_fill="#ffffff",
        input_background_fill_dark="#211d1a",
        input_border_width="1px",
        input_border_color="#ddd6cb",
        input_border_color_dark="#453e37",
        input_border_color_focus="#c4471a",
        input_border_color_focus_dark="#ff8d5c",
        checkbox_label_background_fill="#ffffff",
        checkbox_label_background_fill_dark="#211d1a",
        checkbox_label_background_fill_selected="#fff5ef",
        checkbox_label_background_fill_selected_dark="#3a2417",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="#ddd6cb",
        checkbox_label_border_color_dark="#453e37",
        checkbox_label_border_color_selected="#c4471a",
        checkbox_label_border_color_selected_dark="#ff8d5c",
        block_title_text_color="#2a2420",
        block_title_text_color_dark="#f2ece5",
        block_info_text_color="#6b6259",
        block_info_text_color_dark="#b3a89c",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="#efebe4",
        button_secondary_background_fill_hover="#e5dfd5",
        button_secondary_background_fill_dark="#332d28",
        button_secondary_background_fill_hover_dark="#3f3832",
        slider_color="*primary_600",
    )
