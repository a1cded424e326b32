"""Studies and records without any training."""

from __future__ import annotations

from typing import Any

from lab.study.config import Study

STUDY: dict[str, Any] = {
    "base": "embedded:tiny-sd",
    "methods": {
        "dora": {},
        "lora": {"method": "lora"},
        "half": {"rank": 4, "conv_rank": 4, "rate_of": "dora"},
    },
    "subjects": ["star_teapot", "striped_car"],
    "seeds": 2,
    "common": {"rank": 8, "conv_rank": 8, "max_train_steps": 20},
    "tune": {"subjects": ["bolt_fish"], "learning_rates": [1e-3, 2e-3]},
}


def study(**changes: Any) -> Study:
    return Study.from_dict({**STUDY, **changes})


def record(row: str, subject: str, seed: int, **measures: float) -> dict[str, Any]:
    return {
        "digest": f"{row}{subject}{seed}", "row": row, "method": row, "subject": subject,
        "seed": seed, "learning_rate": None if row == "base" else 1e-3,
        "settings": {} if row == "base" else {"rank": 8, "method": row}, "machine": "a machine",
        "measures": measures,
    }  # fmt: skip
