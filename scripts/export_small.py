"""Write the small files of other exporters into models/, one framework at a time, each in its own environment.

python scripts/export_small.py keras      # in the environment of scripts/requirements-keras.txt
python scripts/export_small.py paddle     # ... of scripts/requirements-paddle.txt
python scripts/export_small.py jax        # ... of scripts/requirements-jax.txt
python scripts/export_small.py sklearn    # ... of scripts/requirements-sklearn.txt

Two runs write the same numbers, but tf2onnx names inner tensors anew each time: tests/test_exporters.py, which lists
some by name, goes with the files that are there. Afterwards the checksums in models/README.md are brought up to date.
"""

from __future__ import annotations

import argparse
from importlib import import_module

import model_checksums
from exporters_table import KINDS

LARGEST = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    for name, build in import_module(f"exporters_{parser.parse_args().kind}").SMALL.items():
        content = build().SerializeToString(deterministic=True)
        assert len(content) < LARGEST, f"{name} has {len(content):,} bytes"
        (model_checksums.MODELS / name).write_bytes(content)
        print(f"wrote {model_checksums.MODELS / name} ({len(content):,} bytes)")
    model_checksums.refresh()


if __name__ == "__main__":
    main()
