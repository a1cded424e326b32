"""The Train tab: settings of a run, its estimated cost, and its progress."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config import PRESETS, ConfigError, TrainConfig
from dora_diffusion.config.foreign import SUFFIXES
from dora_diffusion.config.train import learns_from_photos
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.data.captions import contains_token
from dora_diffusion.models.memory import gpu_of
from dora_diffusion.studio.app import html, settings
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import run, ui
from dora_diffusion.studio.app.views.subject import SubjectTab
from dora_diffusion.studio.jobs.estimates import announced_class_images, estimate
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.store import GONE, UserError, is_id
from dora_diffusion.studio.jobs.subjects import StoredSubject, keep_words, read_subject, subjects_in
from dora_diffusion.studio.jobs.tasks import NAME_LIMIT, start_training
from dora_diffusion.studio.jobs.uploads import shown
from dora_diffusion.training.inputs.subject import outside_toy_world, subjects_of, token_messages

_CHOOSE_ANOTHER = "Choose Stable Diffusion 1.5, SDXL or a model of yours under Base model."
_NEW_ADAPTER = ("none: a new adapter", "")
# Settings of an adapter in the library that a run must share to start from it.
_OF_ADAPTER = (
    "method", "use_dora", "norm_axis", "rank", "conv_rank", "targets", "train_text_encoder",
    "text_encoder_targets",
)  # fmt: skip
_SLIDER = {
    "target": "What it changes, such as a photo of a mug.",
    "positive": "At strength 3, such as a photo of a large mug.",
    "negative": "At strength -3, such as a photo of a small mug.",
    "anchors": "Optional: prompts that stay as they are.",
}
"""Hints at the fields of a slider."""
_PROMPTS = "a photo of a {subject} in the snow\na photo of a {subject} at night"


class TrainTab:
    """Fields of the tab.

    Attributes:
        filled: Values that a preset last filled in, by setting; a different value was typed. The
            value of `init_adapter` is the adapter whose settings were filled in.
        words: The class and token last typed, and their subject.
    """

    def __init__(self, context: Context) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._add_subject()
                self._add_model(context)
                self._add_advanced()
                nothing = html.empty("No subject yet", "Add photos in the Subject tab first.")
                self.cost = ui.html_block(nothing, elem_id="cost")
                self.name = ui.line(
                    "Name of the run", "name", placeholder="default: the subject and the time",
                    max_length=NAME_LIMIT,
                )  # fmt: skip
                self.start = ui.button("Start training", "start", variant="primary", size="lg")
                self.message = ui.html_block(elem_id="train-said")
                self.plan = ui.html_block(elem_id="plan")
            with gr.Column(scale=6, min_width=320):
                text = "Close this page if you like: the run continues."
                ui.html_block(html.heading("4", "Progress", text))
                self.shown = run.RunView()

    def _add_subject(self) -> None:
        text = "For the subject chosen in the Subject tab."
        ui.html_block(html.heading("3", "Class and token", text))
        label = settings.LABELS["class_word"]
        with gr.Row():
            text = "In one or two words: mug, dog, toy robot."
            self.class_word = ui.line(label, "class-word", info=text, min_width=140)
            text = "The trigger word: a rare one."
            self.token = ui.line("Token", "token", "sks", info=text, min_width=140)
        with gr.Accordion("Slider: from words, without photos", open=False):
            text = "For the preset Slider. One prompt per line, pairs in the same order."
            ui.html_block(html.quiet(text))
            self.slider = [
                gr.Textbox(label=name.capitalize(), info=text, lines=1, max_length=4000,
                           elem_id=f"slider-{name}")
                for name, text in _SLIDER.items()
            ]  # fmt: skip
        # Ids are checked where they are used, see `id_dropdown`.
        self.others = gr.Dropdown(
            [], label=settings.LABELS["dataset_config"], multiselect=True, visible=False,
            info="Each is learned with its own token and class.", allow_custom_value=True,
            elem_id="other-subjects",
        )  # fmt: skip

    def _add_model(self, context: Context) -> None:
        presets = [
            (preset.label or name.replace("-", " ").capitalize(), name)
            for name, preset in PRESETS.items()
        ]
        self.preset = gr.Radio(presets, value="balanced", label="Preset", elem_id="preset")
        self.about = ui.html_block(_about(context, "balanced"), elem_id="preset-about")
        cards = [(f"a GPU of {gib} GB", str(gib)) for gib in (4, 6, 8, 10, 12, 16, 24)]
        self.memory = gr.Dropdown(
            [("this machine, as measured now", ""), *cards], value="", label="Memory",
            elem_id="memory",
            info="A preset gets precision, quantised base and resolution that fit it. What a GPU "
            "needs was counted, not yet measured on one. The panel below is about this machine.",
        )  # fmt: skip
        self.model = gr.Dropdown(
            [(base.label, base.name) for base in context.bases()],
            value=settings.EMBEDDED,
            label=settings.LABELS["pretrained_model_name_or_path"],
            info="The embedded ones are toys that train in minutes on a laptop. For real "
            "photos: Stable Diffusion or SDXL. Or type a hub id, a Diffusers folder or a "
            ".safetensors checkpoint.",
            allow_custom_value=not context.launch.is_open,
            elem_id="base-model",
        )
        self.advanced: dict[str, Any] = {
            "init_adapter": gr.Dropdown(
                [_NEW_ADAPTER],
                value="",
                label=settings.LABELS["init_adapter"],
                info="An adapter: a run of the library, which sets base model, rank and "
                "layers, or a file of another program.",
                allow_custom_value=True,
                elem_id="init-adapter",
            )
        }

    def add_storage(self) -> None:
        """Add the values that the browser stores, outside of tabs, which are rendered later."""
        values = settings.preset_values("balanced", settings.EMBEDDED)
        texts = {name: settings.setting_text(value) for name, value in values.items()}
        self.words = ui.storage("words", {})
        self.filled = ui.storage("filled", texts)

    def _add_advanced(self) -> None:
        self.prompts = gr.Textbox(
            _PROMPTS,
            label=settings.LABELS["validation_prompt"],
            info="One per line. {subject} becomes token and class. A line may end with --n "
            "negative prompt, --d seed, --w width, --h height, --l guidance, --s steps, --ss "
            "scheduler, and --drift where it leaves out the token.",
            lines=2,
            max_length=4000,
            elem_id="sample-prompts",
        )
        with gr.Accordion("Settings from a file", open=False):
            text = (
                "A YAML file of settings, such as config.yaml of a run, or a file of sd-scripts, "
                "kohya's GUI, OneTrainer, ai-toolkit, SimpleTuner or Diffusers' scripts."
            )
            ui.html_block(html.quiet(text))
            self.file = gr.File(
                label="File of settings", file_types=[*SUFFIXES], height=120,
                elem_id="settings-upload",
            )  # fmt: skip
            self.loaded = ui.html_block(elem_id="settings-said")
        values = settings.preset_values("balanced", settings.EMBEDDED)
        with gr.Accordion("Advanced settings, by their command-line names", open=False):
            for title, names in settings.GROUPS.items():
                with gr.Accordion(title, open=False):
                    for name in (name for name in names if name not in self.advanced):
                        setting = settings.SETTINGS[name]
                        self.advanced[name] = ui.setting_field(setting, values[name])


def connect(
    context: Context, tab: TrainTab, subjects: SubjectTab, opened: Any, restored: Any
) -> None:
    """Connect the fields to their actions.

    Args:
        context: The app.
        tab: The fields.
        subjects: The Subject tab.
        opened: Event when the tab is opened.
        restored: Event after the page was loaded and its draft restored.
    """
    tab.add_storage()
    fields = [tab.advanced[name] for name in settings.ADVANCED]
    form = [subjects.pick, tab.model, tab.token, tab.class_word, tab.prompts, *fields, tab.others]
    form += tab.slider

    def plan(*values: Any) -> list[str]:
        try:
            return _plan(context, read_form(context, *values)[0])
        except (ValueError, OSError) as error:
            return [html.note(settings.sentence(str(error)), "warn"), ""]

    def start(name: str, *values: Any) -> list[Any]:
        config, learned = read_form(context, *values, ask_hub=True)
        job_id = start_training(context.workspace, config, learned, name)
        jobs = context.queued()
        job = next(job for job in jobs if job.id == job_id)
        text = f"Started {job.title}"
        if job.state == "waiting":
            text = f"Queued {job.title}: number {job.position} in the queue"
        return [
            gr.update(choices=run.run_choices(jobs), value=job_id, visible=True),
            html.note(f"{text}, on {job.base}", "good"),
            "",
        ]

    # One event for all fields: a preset changes a dozen, and concurrent requests may be reordered.
    changed = ui.together("train-form", [*form, subjects.names])
    ui.on([changed, opened], plan, form, [tab.cost, tab.plan], trigger_mode="always_last")
    outputs = [tab.shown.run, tab.message, tab.name]
    ui.on(tab.start.click, start, [tab.name, *form], outputs, show="minimal")
    _connect_others(context, tab, subjects.pick, opened)
    _connect_presets(context, tab, subjects)
    _connect_file(context, tab)
    _connect_words(context, tab, subjects, restored)
    run.connect(context, tab.shown)


def _connect_others(context: Context, tab: TrainTab, pick: Any, opened: Any) -> None:
    """Offer the other subjects, and fill in the settings of an adapter to start from."""

    def offer(subject_id: str | None, selected: Any) -> Any:
        return ui.filled(_other_subjects(context, subject_id, selected))

    def use_start(choice: str | None, filled: Any) -> list[Any]:
        """Return the settings that a run needs to start from a newly chosen adapter.

        Gradio sends an unchanged choice again when the list loses focus; that is ignored.
        """
        before = _known(filled)
        if (choice or "") == before.get("init_adapter", ""):
            return [gr.skip()] * (2 + len(_OF_ADAPTER))
        job = next((job for job in context.jobs() if choice and job.id == choice), None)
        texts: list[Any] = [gr.skip()] * len(_OF_ADAPTER)
        if job and job.settings:
            values = TrainConfig().to_dict() | dict(job.settings)
            texts = [gr.update(value=settings.setting_text(values[name])) for name in _OF_ADAPTER]
        return [
            {**before, "init_adapter": choice or ""}, (job and job.base) or gr.skip(), *texts
        ]  # fmt: skip

    ui.on([pick.change, opened], offer, [pick, tab.others], [tab.others])
    of_adapter = [tab.filled, tab.model, *(tab.advanced[name] for name in _OF_ADAPTER)]
    start_from = tab.advanced["init_adapter"]
    ui.on(start_from.input, use_start, [start_from, tab.filled], of_adapter)


def _connect_presets(context: Context, tab: TrainTab, subjects: SubjectTab) -> None:
    """Fill in the settings of a preset, base model or memory size."""
    fields = [tab.advanced[name] for name in settings.ADVANCED]

    def use_preset(preset: str, model: str, memory: str, filled: Any, *current: Any) -> list[Any]:
        """Return the preset's values, except for settings that the user has typed.

        Unchanged values are not sent again, because the user may be typing: Gradio also sends a
        choice when its list merely loses focus.
        """
        device = gpu_of(memory) if memory else context.device()
        values = settings.preset_values(preset, context.allowed_model(model), device)
        before = _known(filled)
        texts = {name: settings.setting_text(value) for name, value in values.items()}
        now_texts = ("" if value is None else value for value in current)
        texts["init_adapter"] = before.get("init_adapter", "")
        updates = [
            gr.update(value=text)
            if name != "init_adapter" and text != now == before.get(name, now)
            else gr.skip()
            for (name, text), now in zip(texts.items(), now_texts, strict=True)
        ]
        return [texts, *updates]

    filled = [tab.filled, *fields]
    # The last choice counts, even while an earlier one is being filled in.
    choices = [tab.preset.input, tab.model.input, tab.memory.input]
    inputs = [tab.preset, tab.model, tab.memory, *filled]
    about = [tab.preset, subjects.pick, tab.others, tab.model]
    changes = [field.change for field in (*about, subjects.names)]
    describe = functools.partial(_about, context)
    ui.on(changes, describe, about, [tab.about], trigger_mode="always_last")
    ui.on(choices, use_preset, inputs, filled, trigger_mode="always_last")


def _connect_file(context: Context, tab: TrainTab) -> None:
    """Fill in the settings of a file."""
    fields = {
        "pretrained_model_name_or_path": tab.model, "token": tab.token,
        "class_word": tab.class_word, "validation_prompt": tab.prompts,
        **dict(zip(settings.PROMPTS, tab.slider, strict=True)), **tab.advanced,
    }  # fmt: skip
    prompts = ("validation_prompt", *settings.PROMPTS)

    def load_settings(file: str | None) -> list[Any]:
        if not file:
            return [gr.skip()] * (1 + len(fields))
        values, title, text = settings.read_settings_file(Path(file))
        model = values.get("pretrained_model_name_or_path", settings.EMBEDDED)
        left = [name for name in values if name not in fields]
        if not context.launch.allows_model(model):
            left.append("pretrained_model_name_or_path")
        texts = {
            name: "\n".join(value) if name in prompts else settings.setting_text(value)
            for name, value in values.items()
            if name not in left
        }
        note = f"{shown(Path(file).name)} is {title or 'a file of settings'}: "
        note += f"{counted(len(texts), 'setting')} filled in"
        note += f"; not in this form: {listing(left)}" if left else ""
        message = html.note(note, "good") + (html.command(text, "As YAML") if text else "")
        skip = gr.skip()
        return [
            message, *(gr.update(value=texts[n]) if n in texts else skip for n in fields)
        ]  # fmt: skip

    ui.on(tab.file.upload, load_settings, [tab.file], [tab.loaded, *fields.values()])


def _known(filled: Any) -> dict[str, Any]:
    """Return the browser's stored values as a dict, or an empty one if they are invalid."""
    return filled if isinstance(filled, dict) else {}


def _about(
    context: Context, preset: str, subject_id: str | None = None,
    other_ids: Sequence[str] | None = (), model: str | None = None,
) -> str:  # fmt: skip
    """Describe a preset: its purpose, settings for the model, measurements and limits."""
    known = PRESETS.get(preset)
    if known is None:
        return ""
    ids = (subject_id, *(other_ids or ()))
    learned = [subject for subject in subjects_in(context.workspace) if subject.id in ids]
    lines = ((s.title, known.photos_advice(len(s.photos))) for s in learned)
    unfit = html.notes((f"{title}: {line}" for title, line in lines if line), "warn")
    sets = ""
    if model != GONE:
        sets = settings.preset_sentence(preset, context.allowed_model(model))
    sentences = (known.about, settings.token_advice(preset), sets, known.measured)
    return html.quiet(" ".join(filter(None, sentences))) + unfit


def refresh(
    context: Context, jobs: Sequence[Job], choices: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return the timer's update of this tab's form: base models, adapters and other subjects."""
    runs = [(job.label, job.id) for job in jobs if job.stands]
    start = choices.get("start")
    typed = [] if start is None or is_id(start) else [start]  # such as a file
    return {
        "start": ui.choosing([_NEW_ADAPTER, *runs], start, known=typed),
        "base": base_choices(context, choices.get("base")),
        "others": _other_subjects(context, choices.get("subject"), choices.get("others")),
    }


def base_choices(context: Context, selected: str | None) -> Any:
    """Return an update of a list of base models if the selected model's run was deleted.

    Typed values are kept. Otherwise the list remains as it was when the page was built.
    """
    path = Path(selected or "")
    if selected != GONE and (context.workspace.root not in path.parents or path.exists()):
        return ui.changing()
    return ui.choosing([(base.label, base.name) for base in context.bases()], selected)


def _other_subjects(context: Context, subject_id: str | None, selected: Any) -> Any:
    """Return an update of the list of further subjects."""
    titles = {s.id: s.title for s in subjects_in(context.workspace) if s.photos}
    choices = [(title, other) for other, title in titles.items() if other != subject_id]
    remaining = [other for other in selected or () if other == GONE or other != subject_id]
    moved = {} if remaining == (selected or []) else {"value": remaining}
    options, _ = ui.choosing(choices, remaining, visible=bool(choices))
    return ui.changing(**{**moved, **options})


def read_form(
    context: Context, subject_id: str | None, *values: Any, ask_hub: bool = False
) -> tuple[TrainConfig, list[StoredSubject]]:
    """Return the form as settings, checked as far as possible before a run, and the subjects.

    Raises:
        UserError, ConfigError: If a run cannot start with these settings.
    """
    model, token, class_word, prompts, *rest = values
    fields, rest = rest[: len(settings.ADVANCED)], rest[len(settings.ADVANCED) :]
    other_ids, *of_slider = rest or [()]
    advanced = dict(zip(settings.ADVANCED, fields, strict=True))
    learned: list[StoredSubject] = []
    if learns_from_photos(advanced):
        learned = context.learned([subject_id, *(other_ids or ())], f"{token}{class_word}")
    advanced |= dict(zip(settings.PROMPTS, map(str, of_slider), strict=False))
    config = context.run_config(
        model, learned, token, class_word, str(prompts), advanced, ask_hub=ask_hub
    )
    return config, learned


def _connect_words(context: Context, tab: TrainTab, subjects: SubjectTab, restored: Any) -> None:
    """Save class and token with their subject as they are typed."""

    def fill(subject_id: str | None, typed: Any) -> list[Any]:
        """Return a subject's class and token, or the words typed for it or before it existed."""
        typed = typed if isinstance(typed, dict) else {}
        words = [str(typed.get(name) or "")[: ui.LIMIT] for name in ("class_word", "token")]
        try:
            stored = read_subject(context.workspace, subject_id)
        except UserError:
            return [*(words if typed.get("subject") == "" else [gr.skip()] * 2), gr.skip()]
        if typed.get("subject") == "" and not stored.class_word:
            keep_words(context.workspace, stored.id, *words)
        elif typed.get("subject") != stored.id or (stored.class_word and not words[0]):
            return [stored.class_word, stored.token, gr.skip()]
        return [*words, {**typed, "subject": stored.id}]

    def keep(subject_id: str | None, class_word: str, token: str) -> None:
        if subject_id:
            keep_words(context.workspace, subject_id, class_word, token)

    words = [tab.class_word, tab.token]
    typed = [tab.words, subjects.pick, *words]
    typing = [word.change for word in words]
    ui.on(typing, None, typed, [tab.words], js="studio.words", trigger_mode="always_last")
    # From the fields, not from the browser's storage, which a separate event updates later.
    ui.on([word.blur for word in words], keep, [subjects.pick, *words], None)
    inputs, filled = [subjects.pick, tab.words], [*words, tab.words]
    ui.on(subjects.pick.change, fill, inputs, filled)
    ui.on(restored.then, fill, inputs, filled)


def _plan(context: Context, config: TrainConfig) -> list[str]:
    """Return the estimated cost of a run with warnings, and its command."""
    cost = estimate(config, context.jobs(), context.workspace.root, context.device())
    base, words = config.pretrained_model_name_or_path, [s.class_word for s in config.subjects]
    toy = next(filter(None, (outside_toy_world(base, word or "") for word in words)), "")
    notes = html.note(f"{toy} {_CHOOSE_ANOTHER}" if toy else "", "warn")
    try:
        captions = token_messages(subjects_of(replace(config, validation_prompt=[])))
    except ConfigError as error:  # The start of the run refuses it.
        captions = [str(error)]
    notes += html.notes(
        [*map(settings.sentence, captions), *settings.idle_settings(config)], "warn"
    )
    notes += html.notes([announced_class_images(config, cost), *_class_prompts(config)], "info")
    card = html.estimate_card(cost, config.max_train_steps)
    return [card + notes, html.command(settings.command_line(config))]


def _class_prompts(config: TrainConfig) -> list[str]:
    """Return warnings about sample prompts that do not name the subject."""
    tokens = [subject.token for subject in config.subjects if config.has_photos]
    return [
        f"Sample prompt {prompt.prompt!r} does not contain the token "
        f"{' or '.join(map(repr, tokens))}: its images show language drift, not the subject "
        "(end it with --drift if that is intended)."
        for prompt in config.prompts
        if tokens
        and all(tokens)
        and not prompt.is_drift
        and not any(contains_token(prompt.prompt, token) for token in tokens)
    ]
