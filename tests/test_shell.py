"""cli: in real terminals of 40 to 100 columns, in a log, and in shells that complete."""

import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from PIL import Image

from dali_diffusemix import cli
from dali_diffusemix.catalog import LAYOUTS
from dali_diffusemix.generate.editors import PROMPTS

PROGRAM = [sys.executable, "-c", "from dali_diffusemix.cli import main; main(prog_name='dali-diffusemix')"]
FRACTALS = ("fractals", "f.npy", "--count", "3", "--size", "32")

pytestmark = pytest.mark.slow


def environment(**given: str) -> dict[str, str]:
    """The user's, without what says how to show things."""
    hidden = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI", "TERM")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"TERM": "xterm"} | given


def in_a_terminal(folder: Path, *arguments: str, columns: int = 80, setup: str = "", **given: str) -> tuple[int, str]:
    """The exit code, and all that a terminal was sent. `setup` is code that runs first."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    program = [*PROGRAM[:2], f"from dali_diffusemix.cli import display; {setup}; {PROGRAM[2]}"] if setup else PROGRAM
    with subprocess.Popen(
        [*program, *arguments], stdin=child, stdout=child, stderr=child, cwd=folder, env=environment(**given)
    ) as running:
        os.close(child)
        shown = b""
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:  # the other side was closed
                break
            if not piece:
                break
            shown += piece
        os.close(parent)
        return running.wait(), shown.decode().replace("\r\n", "\n")


def in_a_pipe(folder: Path, *arguments: str, **given: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, cwd=folder, env=environment(**given), timeout=60
    )
    return done.returncode, done.stdout, done.stderr


# Terminals and logs ---------------------------------------------------------------------------------------------------


def test_a_terminal_has_a_bar_that_goes_away(tmp_path: Path) -> None:
    code, shown = in_a_terminal(tmp_path, *FRACTALS)
    assert code == 0 and "Rendering fractals" in shown and "3/3" in shown and "\x1b[32m" in shown
    # What is left once the last line was erased.
    assert shown.rpartition("\x1b[2K")[2] == "3 fractals of 32 x 32 pixels in f.npy\n"
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert max(map(len, re.split(r"[\r\n]", drawn))) <= 80
    assert in_a_terminal(tmp_path, "fractals", "g.npy", "--count", "1", "--size", "16", "--json")[1].startswith("{")


def lines_drawn(shown: str) -> list[str]:
    """Every line that was drawn at some time, without colours and movements."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_progress_fits_and_loses_no_number(tmp_path: Path, columns: int) -> None:
    arguments = ("fractals", "f.npy", "--count", "16")
    code, shown = in_a_terminal(tmp_path, *arguments, columns=columns, setup="display._RATE_SECONDS = 0.2")
    lines = [line.rstrip() for line in lines_drawn(shown) if line.startswith("Rendering fractals")]
    assert code == 0 and len(lines) > 5 and max(map(len, lines)) <= columns
    # Nothing was wrapped.
    others = {line for line in lines_drawn(shown) if line and not line.startswith("Rendering fractals")}
    assert others == {"16 fractals of 256 x 256 pixels in f.npy"}
    number, clock = r"\d+/16", r"\d+:\d\d( left)?"
    rate = r"\d[\d.,]* fractals/(s|min)"
    bar = r"[━╸╺]+"
    parts = {
        40: rf"{number} {clock}",
        60: rf"({bar} )?{number} ({rate} )?{clock}",
        100: rf"{bar} {number} ({rate} )?{clock}",
    }
    counted = [line for line in lines if "/16" in line]
    for line in counted:
        assert re.fullmatch(rf"Rendering fractals {parts[columns]}", line), line
    digits = [re.sub(r"\D", "", found[0]) for line in counted if (found := re.search(rate, line))]
    assert all(len(one) <= 3 for one in digits) and bool(digits) == (columns > 40)


def test_a_pipe_has_plain_lines(tmp_path: Path) -> None:
    setup = "display._LINE_SECONDS = 0.2; display._RATE_SECONDS = 0.1"
    program = f"from dali_diffusemix.cli import display; {setup}; {PROGRAM[2]}"
    done = subprocess.run(
        [sys.executable, "-c", program, "fractals", "f.npy", "--count", "16"],
        capture_output=True,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode == 0 and b"\r" not in done.stderr and b"\x1b" not in done.stderr
    assert re.search(
        rb"^Rendering fractals: \d+ of 16, [\d.]+ fractals/s, \d+ seconds left$", done.stderr, re.MULTILINE
    )


def test_help_has_colours_where_they_are_wanted(tmp_path: Path) -> None:
    plain = in_a_pipe(tmp_path, "index", "--help")[1]
    assert "\x1b" not in plain
    coloured = in_a_terminal(tmp_path, "index", "--help")[1]
    assert "\x1b[32m\x1b[1mOptions" in coloured and click.unstyle(coloured) == plain
    for given in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert in_a_terminal(tmp_path, "index", "--help", **given)[1] == plain
    assert in_a_pipe(tmp_path, "index", "--help", FORCE_COLOR="1")[1] == coloured


def test_colours_are_of_terminals_that_want_them(tmp_path: Path) -> None:
    error = "Error: 'none': there is no such folder"
    assert in_a_terminal(tmp_path, "index", "none")[1].rpartition("\x1b[2K")[2].startswith("\x1b[1;31mError: ")
    for arguments in (FRACTALS, ("index", "none")):
        styles = re.findall(r"\x1b\[([0-9;]*)m", in_a_terminal(tmp_path, *arguments, NO_COLOR="1")[1])
        assert set(styles) <= {"0", "1"}  # bold is no colour
    for given in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"CI": "true"}):
        assert in_a_pipe(tmp_path, "index", "none", **given)[2].startswith(error)


@pytest.mark.parametrize("given", [{"TERM": "dumb"}, {"CI": "true"}], ids=["TERM=dumb", "CI"])
def test_where_nothing_is_erased_nothing_is_drawn(tmp_path: Path, given: dict[str, str]) -> None:
    assert in_a_terminal(tmp_path, *FRACTALS, **given) == (0, "3 fractals of 32 x 32 pixels in f.npy\n")


@pytest.mark.parametrize("given", [{}, {"CI": "true"}, {"FORCE_COLOR": "1"}], ids=["plain", "CI", "FORCE_COLOR"])
def test_a_log_has_no_bar(tmp_path: Path, given: dict[str, str]) -> None:
    assert in_a_pipe(tmp_path, *FRACTALS, **given) == (0, "3 fractals of 32 x 32 pixels in f.npy\n", "")


def test_standard_error_may_be_closed(tmp_path: Path) -> None:
    line = f"{shlex.join([*PROGRAM, *FRACTALS])} 2>&-"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert (done.returncode, done.stdout) == (0, "3 fractals of 32 x 32 pixels in f.npy\n")


def test_exit_codes_are_those_of_the_help(tmp_path: Path) -> None:
    assert in_a_pipe(tmp_path, "--version")[0] == 0
    assert in_a_pipe(tmp_path, "index", "none")[0] == 1
    assert in_a_pipe(tmp_path, "index")[0] == 2
    # 130: tests/test_cli.py interrupts a run.


# Completion -----------------------------------------------------------------------------------------------------------


def completed(line: str) -> list[tuple[str, str]]:
    """(kind, word) of what may stand at the end of a line."""
    *words, incomplete = line.split(" ")[1:]
    completes = ShellComplete(cli.main, {}, "dali-diffusemix", "_DALI_DIFFUSEMIX_COMPLETE")
    return [(item.type, item.value) for item in completes.get_completions(words, incomplete)]


def plain(*words: str) -> list[tuple[str, str]]:
    return [("plain", word) for word in words]


def test_words_are_completed() -> None:
    assert completed("dali-diffusemix ") == plain(*cli.main.list_commands(click.Context(cli.main)))
    for line, words in {
        "gen": ("generate",),
        "generate --edit": ("--editor",),
        "generate --editor p": ("procedural",),
        "generate a b --prompts ": PROMPTS,
        "generate a b --prompts autumn,s": ("autumn,snowy", "autumn,sunset"),
        "generate a b --layout ": tuple(LAYOUTS),
        "generate a b --layout cu": ("cub",),
        "preview a --preset ": ("paper", "release"),
        "completion ": ("bash", "zsh", "fish"),
    }.items():
        assert completed(f"dali-diffusemix {line}") == plain(*words), line
    for line, kind in {
        "generate --editor mod": "dir",
        "generate a b --config my": "file",
        "generate --print-config ": "file",
        "index ": "file",
        "preview a --edits ": "file",
    }.items():
        assert [kind for kind, _ in completed(f"dali-diffusemix {line}")] == [kind], line


def test_completing_loads_nothing_heavy() -> None:
    code = (
        "import sys; from dali_diffusemix.cli import main\n"
        "try: main(prog_name='dali-diffusemix')\n"
        "except SystemExit: sys.exit(str({'torch', 'nvidia', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    words = {"COMP_WORDS": "dali-diffusemix preview data --edits", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(_DALI_DIFFUSEMIX_COMPLETE="bash_complete", **words),
    )
    assert (done.stdout, done.stderr.strip()) == ("plain,--edits\n", "set()")


def typed(shell: list[str], setup: str, line: str, expected: str, folder: Path) -> str:
    """What an interactive shell makes of a line with tabs."""
    parent, child = pty.openpty()
    here = str(Path(sys.executable).parent)
    given = environment(PATH=f"{here}:{os.environ['PATH']}", HISTFILE="/dev/null", HOME=str(folder), PS1="$ ")
    with subprocess.Popen(
        shell, stdin=child, stdout=child, stderr=child, cwd=folder, env=given, start_new_session=True
    ) as running:
        os.close(child)
        shown = b""

        def wait_for(text: str) -> None:
            nonlocal shown
            end = time.monotonic() + 30
            while text.encode() not in shown and time.monotonic() < end:
                if select.select([parent], [], [], 0.1)[0]:
                    shown += os.read(parent, 65536)

        os.write(parent, f"{setup}; echo RE''ADY\n".encode())
        wait_for("READY")
        shown = b""
        os.write(parent, line.encode())
        wait_for(expected)
        running.kill()
        os.close(parent)
    return shown.decode()


SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], ""),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; "),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "single.jpg")
    command, before = SHELLS[shell]
    setup = f'{before}eval "$(dali-diffusemix completion {shell})"'
    for line, expected in {
        "dali-diffusemix gen\t": "generate",
        "dali-diffusemix generate a b --prompts autumn,sn\t": "autumn,snowy",
        "dali-diffusemix index ph\t": "photographs",
    }.items():
        assert expected in typed(command, setup, line, expected, tmp_path), line


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes() -> None:
    given = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for line, expected in {
        "dali-diffusemix gen": "generate",
        "dali-diffusemix generate a b --prompts autumn,sn": "autumn,snowy",
    }.items():
        code = f"dali-diffusemix completion fish | source; complete -C '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, env=given)
        assert done.stdout.split() and done.stdout.split()[0] == expected, done


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed(shell: str, tmp_path: Path) -> None:
    code, script, errors = in_a_pipe(tmp_path, "completion", shell)
    assert (code, errors) == (0, "") and f"_DALI_DIFFUSEMIX_COMPLETE={shell}_complete" in script
