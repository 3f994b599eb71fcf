"""A real S3 server on loopback: Ceph's monitor, one disk in a file, and its gateway; no network, no privileges."""

from __future__ import annotations

import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.services import free_ports

KEY, SECRET = "emoscale", "not-a-secret"
SETTINGS = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}/0,v1:127.0.0.1:{old}/0]
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
public network = 127.0.0.0/8
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = 2147483648
bluestore block create = true
osd memory target = 939524096
osd class update on start = false
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
mon data avail warn = 2
mon max pg per osd = 1000
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
log file = {folder}/$name.log
pid file =
ms bind msgr2 = true
ms mon client mode = crc
rgw thread pool size = 64
rgw frontends = beast endpoint=127.0.0.1:{port}
[client.admin]
ms mon client mode = crc
rgw data = {folder}/rgw
"""
"""One copy of everything, no authentication inside, and no complaint about either."""


@dataclass
class Server:
    """A running server; `environment` is what a user of it has set."""

    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that boto3 reads."""
        return {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.port}", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "default", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    @property
    def gateway(self) -> subprocess.Popen[bytes]:
        """The process that speaks S3."""
        return self.processes[-1]

    def stop(self) -> None:
        """End everything that was started."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGKILL)  # its data are thrown away
            process.wait()


def start(folder: Path) -> Server:
    """Bring a server up in an empty folder, with one user."""
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    port, mon, old = free_ports(3)
    server, config, monmap = Server(port), folder / "ceph.conf", str(folder / "monmap")
    fsid = str(uuid.uuid4())
    config.write_text(SETTINGS.format(fsid=fsid, mon=mon, old=old, port=server.port, folder=folder))
    given = ["-c", str(config)]

    def call(*words: str) -> None:
        done = subprocess.run([*words, *given], cwd=folder, capture_output=True, text=True, check=False, timeout=180)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def run(*words: str) -> None:
        with (folder / f"{words[0]}.out").open("ab") as out:
            server.processes.append(subprocess.Popen([*words, *given], cwd=folder, stdout=out, stderr=out))

    try:
        subprocess.run(
            ["monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon},v1:127.0.0.1:{old}]", monmap], check=True, capture_output=True
        )
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        run("ceph-mon", "-f", "-i", "a")
        disk = str(uuid.uuid4())
        call("ceph", "--connect-timeout", "30", "osd", "new", disk)
        call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", disk)
        run("ceph-osd", "-f", "-i", "0")
        run("radosgw", "-f", "-n", "client.admin")
        _until_it_answers(server, folder)
        call(
            "radosgw-admin",
            "-n",
            "client.admin",
            "user",
            "create",
            "--uid=emoscale",
            "--display-name=emoscale",
            f"--access-key={KEY}",
            f"--secret-key={SECRET}",
        )
    except BaseException:
        server.stop()
        raise
    return server


def _until_it_answers(server: Server, folder: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}", timeout=2)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    logs = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in folder.glob("*.out"))
    raise AssertionError(f"the S3 server did not answer in {seconds} s\n{logs}")
