"""Commands in processes of their own that need not import torch and Lightning anew.

A zygote is one process that has imported them; it forks a child for every command. Children have their own
numbers, exit statuses, files and signals, so they can be stopped and killed like any command.
"""

import json
import os
import subprocess
import sys
import time

_MAIN = """
import json, os, sys, traceback
exec(sys.argv[1])
from prefgen.cli import main
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(order["variables"])
        status = 1
        try:
            status = main(order["words"])
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(status)
    print("began", child, flush=True)
    print("ended", child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Zygote:
    """Starts one command at a time.

    Args:
        prelude: source that it runs before the first command, its imports above all.
        folder: receives what commands print.
    """

    def __init__(self, prelude, *, folder):
        self._folder, self._commands = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        with (folder / "zygote.err").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, prelude], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        assert self._process.stdout.readline() == "ready\n", (folder / "zygote.err").read_text()

    def start(self, *words, **variables):
        """``prefgen WORDS`` in a child."""
        self._commands += 1
        out, err = (self._folder / f"{self._commands}.{name}" for name in ("out", "err"))
        order = {"words": words, "variables": variables, "out": str(out), "err": str(err)}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        said = said_next(self._process.stdout, "began")  # past the end of a command that nobody waited for
        return Child(int(said), said=self._process.stdout, out=out, err=err)

    def close(self):
        """End the process; commands have ended."""
        self._process.kill()
        self._process.communicate()


def said_next(lines, *words):
    """What stands behind ``words`` in the next line that begins with them."""
    for line in lines:
        found = line.split()
        if found[: len(words)] == list(words):
            return found[-1]
    raise AssertionError("the zygote has died")


class Child:
    """One command."""

    def __init__(self, pid, *, said, out, err):
        self.pid, self._said, self._out, self._err = pid, said, out, err

    def send_signal(self, number):
        """As the user's shell would."""
        os.kill(self.pid, number)

    def running(self):
        """Whether it still runs; a zombie does not."""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def wait_for(self, path, *, seconds=120):
        """Until a file is there."""
        end = time.monotonic() + seconds
        while not path.exists():
            assert self.running(), self._err.read_text()
            assert time.monotonic() < end, f"{path} did not appear"
            time.sleep(0.02)

    def wait(self):
        """Exit status (below 0 for a signal), standard output and standard error."""
        status = said_next(self._said, "ended", str(self.pid))
        return int(status), self._out.read_text(), self._err.read_text()
