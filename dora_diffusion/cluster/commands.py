"""The commands ``fleet`` (an adapter for each of many subjects) and ``serve``."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path

from dora_diffusion.cli.commands import train
from dora_diffusion.cli.commands.parser import Parser, add_flags
from dora_diffusion.cli.console.output import print_json
from dora_diffusion.cluster.fleet.connection import WorkerSettings
from dora_diffusion.cluster.serving.settings import ServingSettings
from dora_diffusion.config.fields import REQUIRED, flag
from dora_diffusion.config.subject_list import subject_configs
from dora_diffusion.config.wording import counted


@dataclass(frozen=True, kw_only=True)
class FleetSettings(WorkerSettings):
    """Settings of ``fleet``; ``args`` also contains the settings of training."""

    args: argparse.Namespace = field(default_factory=argparse.Namespace)
    subjects: str = flag(
        REQUIRED,
        "Dataset file (YAML list of subjects, each with settings of its own), or a folder with a "
        "folder of photos for each subject.",
        positional=True,
    )
    retries: int = flag(
        3,
        "Further workers for a subject whose worker or node is lost; each resumes from its last "
        "checkpoint.",
    )
    pack: int = flag(
        1,
        "Subjects that each worker trains at once, where their settings allow it, in about as many "
        "operations as one.",
        least=1,
        metavar="K",
    )
    json: bool = flag(False, "Print the records as JSON.")

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Add the command's flags, and the flags of training."""
        add_flags(parser, cls.settings())
        parser.add_argument(
            "--output",
            dest="output_dir",
            default=argparse.SUPPRESS,
            help="Folder shared by all workers, or fsspec URL such as s3://bucket/shop: results of "
            "each subject in OUTPUT/NAME. Default: as --output_dir.",
        )
        parser.usage = (
            "%(prog)s SUBJECTS [--address ADDRESS] [--output OUTPUT] [--SETTING VALUE ...]"
        )
        flags = [setting.name for setting in cls.settings()]
        parser.split_help((*flags, "config", "debug", *train.FIRST))
        train.add_settings(parser)

    @classmethod
    def of_arguments(cls, args: argparse.Namespace) -> FleetSettings:
        """Read the settings of the fleet; `train_config` reads the settings of training."""
        settings = dataclasses.replace(cls.read(vars(args)), args=args)
        settings.warn()
        return settings

    def perform(self) -> int:
        """Train all remaining subjects. Returns the exit code: 1 if a subject failed."""
        config = train.train_config(self.args)
        configs = subject_configs(self.subjects, config)
        if self.args.dry_run:
            return train.print_training_summary(configs)
        train.warn_of_toy_model(config, self.args)
        from dora_diffusion.cluster.fleet.run import FleetTable, run_fleet

        table = FleetTable()
        try:
            fleet = run_fleet(
                configs, config.output_dir, self.address, self.share, retries=self.retries,
                pack=self.pack, on_change=table,
            )  # fmt: skip
        except KeyboardInterrupt:
            fleet = None
        finally:
            table.close()
        if fleet is None:
            print("stopped; the same command resumes")
            return 130
        if self.json:
            print_json([dataclasses.asdict(fleet.records[name]) for name in configs])
            return int(bool(fleet.failed))
        before = f", {len(fleet.known)} of them before" if fleet.known else ""
        done = len(fleet.records) - len(fleet.failed)
        print(f"{counted(done, 'subject')} done{before}, {len(fleet.failed)} failed")
        if fleet.unlisted:
            earlier = counted(len(fleet.unlisted), "subject")
            print(f"{earlier} of earlier calls, not listed in {self.subjects}, kept in the records")
        print("\n".join(f"{name}: {path}" for name, path in fleet.files.items()))
        return int(bool(fleet.failed))


class ServeSettings(ServingSettings):
    """Settings of ``serve``."""

    def perform(self) -> int:
        """Serve until it is interrupted."""
        from dora_diffusion.cluster.serving import deploy
        from dora_diffusion.cluster.serving.catalogue import Catalogue
        from dora_diffusion.models.locate import is_embedded, resolve_folder

        token, path = deploy.read_token(self), Path(self.base).expanduser()
        # Replicas have another working directory, and may not download the model at once.
        if path.exists():
            settings = replace(self, base=str(path.resolve()))
        else:
            settings = self
            if not is_embedded(self.base):
                resolve_folder(self.base_model)
        deploy.serve(settings, token, Catalogue(self.adapters))
        return 0
