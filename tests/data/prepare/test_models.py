"""Captions and masks by models, each against the model called by itself."""

from __future__ import annotations

import csv
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.utils.import_utils import BACKENDS_MAPPING

from dora_diffusion.data import prepare as prepare_models
from dora_diffusion.data.prepare import PrepareError, open_captioner, open_masker
from tests.data.prepare.conftest import with_scipy


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def words(folder, tokens):
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(folder).decode(tokens, skip_special_tokens=True)
    return " ".join(text.split())


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_a_caption_is_what_the_model_generates(kind, models, image):
    from transformers import AutoImageProcessor, BlipForConditionalGeneration, GitForCausalLM

    folder = models(kind)
    model = {"blip": BlipForConditionalGeneration, "git": GitForCausalLM}[kind]
    pixels = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")
    tokens = model.from_pretrained(folder).generate(**pixels, max_new_tokens=60, do_sample=False)
    caption = open_captioner(str(folder))(image)
    assert caption == words(folder, tokens[0])
    assert caption


def test_a_chat_model_is_asked_and_only_its_answer_is_the_caption(models, image):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = models("llava")
    inputs = AutoProcessor.from_pretrained(folder)(
        text="USER : <image> a photo of", images=image, return_tensors="pt"
    )
    tokens = LlavaForConditionalGeneration.from_pretrained(folder).generate(
        **inputs, max_new_tokens=60, do_sample=False
    )
    asked = inputs["input_ids"].shape[1]
    caption = open_captioner(str(folder), "a photo of")(image)
    assert caption == words(folder, tokens[0, asked:])
    assert "USER" not in caption.split()[:1]


TAGS = [("general", 9), ("1girl", 0), ("long_hair", 0), ("^_^", 0), ("rei", 4), ("asuka", 4)]


@pytest.fixture
def tagger(tmp_path, monkeypatch):
    """A WD tagger's folder, and a runtime that gives fixed probabilities."""
    with (tmp_path / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tag_id", "name", "category", "count"])
        writer.writerows([i, name, kind, 1] for i, (name, kind) in enumerate(TAGS))
    (tmp_path / "model.onnx").write_bytes(b"")
    runtime = ModuleType("onnxruntime")
    runtime.scores, runtime.given = [0.99, 0.5, 0.9, 0.36, 0.84, 0.86], []

    class Session:
        def __init__(self, path, providers):
            assert path == str(tmp_path / "model.onnx")

        def get_inputs(self):
            return [SimpleNamespace(name="input_1:0", shape=["N", 8, 8, 3])]

        def run(self, outputs, feed):
            runtime.given.append(feed["input_1:0"])
            return [np.array([runtime.scores], np.float32)]

    runtime.InferenceSession = Session
    runtime.get_available_providers = lambda: ["CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    return SimpleNamespace(folder=tmp_path, runtime=runtime)


def test_a_tagger_gives_its_tags_by_their_probability(tagger):
    assert open_captioner(str(tagger.folder))(Image.new("RGB", (8, 4))) == (
        "long hair, asuka, 1girl, ^_^"
    )
    [pixels] = tagger.runtime.given
    # Blue, green, red from 0 to 255, in the middle of a white square.
    assert (pixels.dtype, pixels.shape) == (np.float32, (1, 8, 8, 3))
    open_captioner(str(tagger.folder))(Image.new("RGB", (8, 4), (10, 20, 30)))
    pixels = tagger.runtime.given[1][0]
    assert pixels[:2].min() == pixels[6:].min() == 255
    assert (pixels[2:6] == (30, 20, 10)).all()


def test_a_segmentation_model_masks_the_pixels_of_its_label(models, image):
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    folder = models("segformer")
    model = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    pixels = SegformerImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**pixels).logits
    size = (image.height, image.width)
    labels = torch.nn.functional.interpolate(
        logits, size=size, mode="bilinear", align_corners=False
    ).argmax(1)[0]
    counts = torch.bincount(labels.flatten(), minlength=3)
    assert (counts > 0).sum() > 1
    for index, label in ((1, "Hound"), (2, "cat")):
        mask = np.asarray(open_masker(str(folder), label=label)(image))
        assert mask.tolist() == (255 * (labels == index)).tolist()


def test_of_two_labels_the_subject_is_the_one_that_is_not_the_background(models, image):
    from transformers import AutoImageProcessor, DetrForSegmentation

    folder = models("detr")
    processor = AutoImageProcessor.from_pretrained(folder)
    model = DetrForSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    [found] = processor.post_process_panoptic_segmentation(
        outputs, threshold=0.9, target_sizes=[(image.height, image.width)]
    )
    wanted = [part["id"] for part in found["segments_info"] if part["label_id"] == 1]
    expected = torch.isin(found["segmentation"], torch.tensor(wanted))
    assert expected.sum() > 0
    # Whatever the subject's class is.
    mask = open_masker(str(folder), label="dog")(image)
    assert np.asarray(mask).tolist() == (255 * expected.int()).tolist()


def bright(self, pixel_values, **_):
    """Outputs of a model that is sure of its label 1 where an image is bright, of 0 elsewhere."""
    from transformers.utils import ModelOutput

    height, width = pixel_values.shape[-2:]
    found = pixel_values.mean(1, keepdim=True)
    found = 99 * (found - (found.amax() + found.amin()) / 2)
    rest = torch.full((1, self.config.num_labels - 2, height, width), -1e4)
    classes = torch.full((1, 2, self.config.num_labels + 1), -99.0)
    classes[0, 0, 1] = classes[0, 1, 0] = 99.0
    masks = torch.cat([found, -found], 1)
    return ModelOutput(
        logits=classes if "Detr" in type(self).__name__ else torch.cat([-found, found, rest], 1),
        pred_masks=masks, pred_boxes=torch.zeros(1, 2, 4),
        class_queries_logits=classes, masks_queries_logits=masks,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["segformer", "detr", "mobilevit", "mask2former"])
@pytest.mark.parametrize("size", [(160, 96), (72, 120), (64, 64)])
def test_a_mask_lies_where_the_model_saw_the_subject(kind, size, models, monkeypatch):
    """A white rectangle near a corner, of images that processors scale, pad or crop."""
    height = size[1]
    box = (6, height - 30, 30, height - 8)
    image = Image.new("RGB", size)
    image.paste("white", box)
    with with_scipy():
        mask = open_masker(str(models(kind)), label="dog")
    kinds = {"segformer": "SegformerForSemanticSegmentation", "detr": "DetrForSegmentation",
             "mobilevit": "MobileViTForSemanticSegmentation",
             "mask2former": "Mask2FormerForUniversalSegmentation"}  # fmt: skip
    monkeypatch.setattr(getattr(transformers, kinds[kind]), "forward", bright)
    found = mask(image)
    assert (found.size, found.mode) == (size, "L")
    # Masks have a quarter of some processors' sides.
    assert np.abs(np.subtract(found.getbbox(), box)).max() <= 3
    assert set(np.unique(found)) == {0, 255}


def test_a_label_that_is_not_the_models_is_refused_with_those_that_are(models):
    with pytest.raises(PrepareError, match=r"choose the subject's: .*cat, dog"):
        open_masker(str(models("segformer")))
    with pytest.raises(PrepareError, match=r"has no label 'houn' \(did you mean hound\?\)"):
        open_masker(str(models("segformer")), label="houn")


@pytest.fixture
def rembg(monkeypatch):
    module = ModuleType("rembg")
    module.sessions = []

    def remove(image, *, session, only_mask):
        assert only_mask
        return image.convert("L")

    def new_session(name):
        if name == "gone":
            raise ValueError("No session class found for\nmodel gone")
        module.sessions.append(name)
        return name

    module.remove, module.new_session = remove, new_session
    monkeypatch.setitem(sys.modules, "rembg", module)
    return module


def test_rembg_is_called_with_the_model_that_is_named(rembg, image):
    assert open_masker("rembg")(image).tobytes() == image.convert("L").tobytes()
    open_masker("rembg:isnet-general-use")
    assert rembg.sessions == ["u2net", "isnet-general-use"]
    with pytest.raises(
        PrepareError,
        match=r"rembg:gone cannot be opened \(ValueError: No session class found for model gone",
    ):
        open_masker("rembg:gone")


@pytest.mark.parametrize("error", [ImportError, SystemExit])
def test_what_is_not_installed_is_said_with_what_to_install(error, monkeypatch, tagger):
    def fail(name, *rest):
        raise error(1)

    missing = "pip install rembg onnxruntime"
    if error is SystemExit:  # so rembg ends where it has no runtime
        monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=fail))
    else:
        monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(PrepareError, match=missing):
        open_masker("rembg")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PrepareError, match=r"cannot be opened .*\('pip install onnxruntime'\)"):
        open_captioner(str(tagger.folder))


def test_a_model_of_another_kind_is_refused_in_one_line(models, tmp_path):
    with pytest.raises(PrepareError, match="is a segformer model, which writes no captions"):
        open_captioner(str(models("segformer")))
    with pytest.raises(PrepareError, match="is a vit model, which gives no masks"):
        open_masker(str(models("vit")))
    for open_model in (open_captioner, open_masker):
        with pytest.raises(PrepareError, match="does not exist; give a model's folder"):
            open_model(str(tmp_path / "gone"))
        with pytest.raises(ValueError, match="could not be loaded"):
            open_model(str(tmp_path))


def test_a_package_that_a_model_needs_is_named(models, monkeypatch):
    _, text = BACKENDS_MAPPING["scipy"]
    monkeypatch.setitem(BACKENDS_MAPPING, "scipy", (lambda: False, text))
    folder = models("mask2former")
    with pytest.raises(ValueError, match=r"needs a package that is missing: .*scipy") as error:
        open_masker(str(folder), label="dog")
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_a_hub_id_is_fetched_with_the_weights_of_its_kind(models, monkeypatch, tagger):
    fetched = []

    def fetch(name, revision, allow, ignore):
        fetched.append(allow)
        return tagger.folder if name == "some/tagger" else models("git")

    monkeypatch.setattr(prepare_models, "fetch_snapshot", fetch)
    open_captioner("some/tagger")
    open_captioner("some/git")
    assert fetched[1::2] == [["model.onnx"], ["*.safetensors"]]
    assert not any(name.endswith((".bin", ".safetensors", "*")) for name in fetched[0])
