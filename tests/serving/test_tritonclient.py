"""Triton's own client against a real server, where it is installed.

`tritonclient[grpc]` needs an older protobuf than ours may be, so it is looked for in the interpreter that the variable
VISFORMER_TRITON_PYTHON names, else in this one; what is missing there is skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.fakes import picture
from tests.serving.running import running

PYTHON = os.environ.get("VISFORMER_TRITON_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("triton_calls.py")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_every_call_of_the_client(protocol, bundle, tmp_path):
    if subprocess.run([PYTHON, "-c", f"import tritonclient.{protocol}.aio"], capture_output=True).returncode:
        pytest.skip(f"tritonclient[{protocol}] is not installed for {PYTHON}")
    (tmp_path / "a.png").write_bytes(picture(80, (40, 30)))
    with running(str(bundle), "--grpc_port", "0") as server:
        server.event("ready")
        url = server.event("listening", 2 if protocol == "grpc" else 1)["url"].partition("//")[2]
        ended = subprocess.run(
            [PYTHON, SCRIPT, protocol, url, tmp_path / "a.png"], capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1] == "all calls answered"
        assert not server.events("fault")
