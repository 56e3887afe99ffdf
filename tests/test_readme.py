"""What the README tells people to run, runs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_from_peft_to_an_endpoint(tmp_path: Path) -> None:
    """The script as it stands, on a free port, in a folder of its own."""
    section = (ROOT / "README.md").read_text().split("### From PEFT to an endpoint")[1]
    script = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert script is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "model_store").symlink_to(ROOT / "model_store")
    (tmp_path / "from_peft.py").write_text(script[1].replace("8001", str(port)))
    done = subprocess.run(
        [sys.executable, "from_peft.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['math', 'code', 'bio', 'tales']"
    assert (tmp_path / "my-model/bundle.json").exists()
