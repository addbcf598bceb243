"""Hold models/ against the table in models/README.md: every file is listed there, with its SHA-256.

python scripts/model_checksums.py            check; exit code 1 and a line for each difference
python scripts/model_checksums.py --write    bring the checksums up to date
"""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "models"
ROW = re.compile(r"^(\| \[(?P<name>[^\]]+)\]\(.*\| )`(?P<sha256>[0-9a-f]*)` \|$", re.MULTILINE)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(folder: Path = MODELS) -> list[str]:
    """What the table and the files disagree on, one sentence each; none if all is well."""
    listed = {row["name"]: row["sha256"] for row in ROW.finditer((folder / "README.md").read_text("utf-8"))}
    present = {path.name for path in folder.iterdir()} - {"README.md"}
    return [
        *(f"{name} is not in the table" for name in sorted(present - listed.keys())),
        *(f"{name} is in the table but not in the folder" for name in sorted(listed.keys() - present)),
        *(
            f"{name} has not the checksum that the table gives"
            for name in sorted(listed.keys() & present)
            if sha256(folder / name) != listed[name]
        ),
    ]


def refresh(folder: Path = MODELS) -> None:
    """Write the files' checksums into the table's rows."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8")
    readme.write_text(ROW.sub(lambda row: f"{row[1]}`{sha256(folder / row['name'])}` |", text), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="bring the checksums up to date")
    if parser.parse_args().write:
        refresh()
    if found := differences():
        raise SystemExit("\n".join(found))
    print(f"{MODELS / 'README.md'} agrees with its files")


if __name__ == "__main__":
    main()
