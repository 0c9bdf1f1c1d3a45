"""The file of results, a line of JSON per run, from which a stopped study is continued."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from .settings import Setting

SETTING = {field.name for field in fields(Setting)}
RUN = {"curve", "optimum", "judge accuracy", "seconds", "command", "environment"}


class Results:
    """Runs by setting and seed; only one process writes."""

    def __init__(self, path: Path):
        self.path = path
        self.runs: dict[tuple[Setting, int], dict] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # a line without an end was being written when the study was stopped: its run is repeated
        for number, line in enumerate(text.split("\n")[:-1], 1):
            self._read(line, number)

    def _read(self, line: str, number: int) -> None:
        at = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
            setting, seed = Setting(**record["setting"]), record["seed"]
            missing = (SETTING - set(record["setting"])) | (RUN - set(record))
            if missing:
                raise KeyError(", ".join(sorted(missing)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{at}: expected a run of this study, got {line[:60]!r} ({type(error).__name__}: "
                f"{error}). Remove the line, or choose another --output"
            ) from None
        if (setting, seed) in self.runs:
            raise ValueError(
                f"{at}: {setting}, seed {seed}, is in the file twice. Remove one of the lines"
            )
        self.runs[setting, seed] = record

    def add(self, setting: Setting, seed: int, measured: dict) -> None:
        record = {"setting": asdict(setting), "seed": seed, **rounded(measured)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._drop_half_a_line()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self.runs[setting, seed] = record

    def _drop_half_a_line(self) -> None:
        with self.path.open("rb+") as file:
            text = file.read()
            file.truncate(text.rfind(b"\n") + 1)


def rounded(x):
    """Round to six decimals."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 6) if isinstance(x, float) else x
