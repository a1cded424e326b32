"""The look: a theme of the system's own fonts (nothing is fetched) and one warm accent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# A page that is left has its streams ended by the browser. Gradio does so first, and logs errors.
_LEAVE = """const abort = AbortController.prototype.abort;
AbortController.prototype.abort = function (...reason) {
  if (window.event?.type !== 'beforeunload') abort.apply(this, reason);
};"""
HEAD = f"""<meta name="color-scheme" content="light dark">
<script>{_LEAVE}</script>
<style>{Path(__file__).with_name("phone.css").read_text(encoding="utf-8")}</style>"""
SANS = ("Inter", "ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")


_PERSIMMON = (
    "#fff5ef", "#ffe6d8", "#ffc9ae", "#ffa57d", "#f97c4b", "#e35d2b", "#c4471a", "#a03816",
    "#7f2e15", "#672714", "#3a1107",
)  # fmt: skip
# Name -> colour by day and by night.
_COLORS = {
    "body_background_fill": ("#f6f4f0", "#171412"),
    "background_fill_primary": ("#ffffff", "#211d1a"),
    "background_fill_secondary": ("#faf9f6", "#1c1816"),
    "block_background_fill": ("transparent", "transparent"),
    "block_border_color": ("#e7e2da", "#38322d"),
    "border_color_primary": ("#e7e2da", "#38322d"),
    "block_label_background_fill": ("transparent", "transparent"),
    "block_label_text_color": ("#6b6259", "#b3a89c"),
    "input_background_fill": ("#ffffff", "#211d1a"),
    "input_border_color": ("#ddd6cb", "#453e37"),
    "input_border_color_focus": ("#c4471a", "#ff8d5c"),
    "checkbox_label_background_fill": ("#ffffff", "#211d1a"),
    "checkbox_label_background_fill_selected": ("#fff5ef", "#3a2417"),
    "checkbox_label_border_color": ("#ddd6cb", "#453e37"),
    "checkbox_label_border_color_selected": ("#c4471a", "#ff8d5c"),
    "block_title_text_color": ("#2a2420", "#f2ece5"),
    "block_info_text_color": ("#6b6259", "#b3a89c"),
    "button_primary_background_fill": ("*primary_600", "*primary_600"),
    "button_primary_background_fill_hover": ("*primary_700", "*primary_500"),
    "button_primary_text_color": ("white", "white"),
    "button_secondary_background_fill": ("#efebe4", "#332d28"),
    "button_secondary_background_fill_hover": ("#e5dfd5", "#3f3832"),
}
# Fields stand on the page itself: no box around each of them.
_PLAIN = {
    "block_border_width": "0px",
    "block_padding": "0px",
    "block_label_border_width": "0px",
    "block_title_text_weight": "600",
    "block_shadow": "none",
    "input_border_width": "1px",
    "checkbox_label_border_width": "1px",
    "slider_color": "*primary_600",
}


def spoken_words() -> Any:
    """What screen readers are told when work ends, which Gradio 6 has no words for."""
    import gradio as gr

    return gr.I18n(en={"common.complete": "Complete"})


def make_theme() -> Any:
    """The Gradio theme; `style.css` does the rest."""
    import gradio as gr

    persimmon = gr.themes.Color(*_PERSIMMON, name="persimmon")
    dark = {f"{name}_dark": night for name, (_, night) in _COLORS.items()}
    light = {name: day for name, (day, _) in _COLORS.items()}
    return gr.themes.Base(
        primary_hue=persimmon,
        secondary_hue=persimmon,
        neutral_hue="stone",
        radius_size="lg",
        font=SANS,
        font_mono=MONO,
    ).set(**light, **dark, **_PLAIN)
