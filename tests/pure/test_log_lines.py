"""Log lines on stderr: their form, what is escaped, and which levels are written."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pgcoord_cli.errors import ConnectionFailed, PgcoordError
from pgcoord_cli.render.log import configure_logging, report_failure, stop_logging
from pgcoord_cli.settings import ColorMode, LogFormat, Presentation

TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    hook = threading.excepthook
    yield
    stop_logging()
    assert threading.excepthook is hook


def log_each_level() -> None:
    for text, level in LEVELS.items():
        logging.getLogger("pgcoord.candidate").log(level, text)


@pytest.mark.parametrize(
    ("options", "is_daemon", "written"),
    [
        ({}, True, ["info", "warning", "error"]),
        ({"quiet": True}, True, ["warning", "error"]),
        ({"verbose": True}, True, ["debug", "info", "warning", "error"]),
        ({}, False, ["warning", "error"]),
        ({"quiet": True}, False, ["warning", "error"]),
        ({"verbose": True}, False, ["debug", "info", "warning", "error"]),
    ],
)
def test_verbose_and_quiet_choose_the_levels(
    options: dict[str, Any], is_daemon: bool, written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(Presentation(**options), is_daemon=is_daemon)
    log_each_level()
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == written


def test_other_libraries_are_written_from_warnings_on_also_when_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Presentation(verbose=True), is_daemon=True)
    logging.getLogger("asyncio").info("selector")
    logging.getLogger("asyncio").warning("slow callback")
    assert [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "WARNING [asyncio] slow callback"
    ]


def test_configured_again_a_line_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        configure_logging(Presentation(), is_daemon=True)
    logging.getLogger("pgcoord.tail").info("connected")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_in_text_a_record_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Presentation(), is_daemon=True)
    logging.getLogger("pgcoord.worker").info("%s: %s", "a\nb", "\x1b[31mred", extra={"epoch": 7})
    line = capsys.readouterr().err
    assert line.partition(" ")[2] == "INFO [worker] a\\nb: \\x1b[31mred\n"
    assert re.fullmatch(TIME, line.partition(" ")[0])


def test_in_json_a_record_is_one_object_with_the_fields_of_the_event(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Presentation(log_format=LogFormat.JSON), is_daemon=True)
    logging.getLogger("pgcoord.worker").warning("a\nb: ä", extra={"epoch": 7, "node": "west-1", "component": "mine"})
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    document = json.loads(line)
    assert re.fullmatch(TIME, document.pop("time"))
    assert document == {
        "level": "WARNING", "component": "worker", "message": "a\nb: ä", "epoch": 7, "node": "west-1",
    }  # fmt: skip


def test_in_json_a_stderr_that_is_not_in_unicode_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "ascii", errors="backslashreplace"))
    configure_logging(Presentation(log_format=LogFormat.JSON), is_daemon=True)
    logging.getLogger("pgcoord.worker").info("ä")
    assert json.loads(written.getvalue())["message"] == "ä"


@pytest.mark.parametrize(("mode", "is_colored"), [(ColorMode.ALWAYS, True), (ColorMode.AUTO, False)])
def test_levels_are_coloured_only_where_colour_is_wanted(
    mode: ColorMode, is_colored: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(Presentation(color=mode), is_daemon=True)
    logging.getLogger("pgcoord.tail").warning("held up")
    assert ("\x1b[33mWARNING\x1b[0m" in capsys.readouterr().err) is is_colored


def test_a_traceback_has_the_form_of_the_other_lines_and_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("postgresql://me:secret@host/db")

    configure_logging(Presentation(), is_daemon=True)
    thread = threading.Thread(target=fail, name="slot 1")
    thread.start()
    thread.join()
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith("CRITICAL [pgcoord] thread slot 1 has ended with an error")
    assert rest[-1].endswith("ValueError: postgresql://me:***@host/db")
    assert all(" CRITICAL [pgcoord] " in line for line in rest)


def test_in_json_a_traceback_is_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Presentation(log_format=LogFormat.JSON), is_daemon=True)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("pgcoord.worker").exception("ended")
    document = json.loads(capsys.readouterr().err)
    assert document["traceback"].splitlines()[-1] == "ValueError: boom"


def test_a_reader_of_stderr_that_has_gone_ends_no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    configure_logging(Presentation(), is_daemon=True)
    logging.getLogger("pgcoord.tail").info("connected")


# The error that ends a call

FAILURE = ConnectionFailed("cannot connect: refused", hint="is the server up?")


def test_the_error_that_ends_a_daemon_is_a_line_like_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Presentation(log_format=LogFormat.JSON), is_daemon=True)
    report_failure(FAILURE, as_json=False, color=ColorMode.AUTO)
    out, err = capsys.readouterr()
    document = json.loads(err)
    assert (out, document["level"], document["code"]) == ("", "ERROR", "cannot_connect")
    assert document["message"] == "cannot connect: refused; is the server up?"
    assert document["hint"] == "is the server up?"


def test_with_json_output_it_is_a_document_on_stdout_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Presentation(), is_daemon=True)
    report_failure(FAILURE, as_json=True, color=ColorMode.AUTO)
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "cannot_connect"
    assert err.endswith("ERROR [pgcoord] cannot connect: refused; is the server up?\n")


def test_what_is_on_stdout_already_is_not_said_there_again(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Presentation(), is_daemon=True)
    report_failure(PgcoordError("3 events wait", answered=True), as_json=True, color=ColorMode.AUTO)
    out, err = capsys.readouterr()
    assert (out, err.count("3 events wait"), err.count("\n")) == ("", 1, 1)


def test_the_error_of_any_other_command_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Presentation(), is_daemon=False)
    report_failure(FAILURE, as_json=False, color=ColorMode.AUTO)
    shown = "error: cannot connect: refused\nhint: is the server up?\n"
    assert capsys.readouterr() == ("", shown)
    stop_logging()
    report_failure(FAILURE, as_json=False, color=ColorMode.AUTO)
    assert capsys.readouterr() == ("", shown)
