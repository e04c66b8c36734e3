"""What every benchmark shares: the machine it ran on, and the file its result goes to."""

import datetime
import json
import os
import platform
from pathlib import Path

import torch

import lipcert

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict) -> None:
    """Prints a result and writes it with date, hardware and versions to results/NAME.json."""
    record = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lipcert": lipcert.__version__,
        **result,
    }
    print(json.dumps(record, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((n.split(":")[1].strip() for n in names if n.startswith("model name")), "unknown")
