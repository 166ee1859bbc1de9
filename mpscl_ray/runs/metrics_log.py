"""metrics.jsonl: what was measured. A record is flat and has an int ``global_step``."""

from __future__ import annotations

from pathlib import Path

from mpscl_ray.runs.json_lines import JsonLines


class MetricsLog(JsonLines):
    """The records of one run."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, is_valid=lambda record: isinstance(record.get("global_step"), int))

    def rewind(self, global_step: int) -> int:
        """Drop the records after a global step, which a resumed run makes again. Returns how many were dropped."""
        records = self.read()
        kept = [record for record in records if record["global_step"] <= global_step]
        if self.file.exists():
            self.replace(kept)
        return len(records) - len(kept)
