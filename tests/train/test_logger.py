"""The logger: rows that survive a resume, a terminal for people and for files, nothing secret sent, a summary."""

import io
import json
import os
import time

import psutil
import pytest

from fovlm.checkpoint.run_folder import Row, read_metrics
from fovlm.config.schema import Experiment
from fovlm.paths import versions
from fovlm.redact import HIDDEN, redact
from fovlm.train.logger import Logger, commit


@pytest.fixture
def experiment(tmp_path):
    values = {
        "name": "small",
        "note": "a test",
        "data": {
            "sources": {"clips": {"shards": "clips.tar", "kind": "video"}},
            "mixture": {"clips": 1.0},
            "val": ["clips"],
        },
        "train": {"steps": 10},
        "logger": {"wandb": "disabled", "folder": str(tmp_path / "run")},
    }
    return Experiment.model_validate(values)


def rows(experiment) -> list[Row]:
    return read_metrics(experiment.run_folder)


def losses(experiment) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in rows(experiment)]


def test_a_row_per_log_step_that_later_lines_complete(experiment):
    with Logger(experiment, 10, out=io.StringIO()) as logger:
        logger.log(2, {"loss": 3.0})
        logger.log(4, {"loss": 2.5, "samples_per_second": 7.0})
        logger.log(4, {"val_loss": 2.75})
        logger.log(6, {"loss": 2.0, "grad_norm": float("inf")})
    assert losses(experiment) == [(2, 3.0), (4, 2.5), (6, 2.0)]
    assert [row.get("val_loss") for row in rows(experiment)] == [None, 2.75, None]
    assert [row.get("samples_per_second") for row in rows(experiment)] == [None, 7.0, None]
    last = (experiment.run_folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["grad_norm"] is None, "JSON has no infinity"
    assert "grad_norm" not in rows(experiment)[-1]


def test_resuming_drops_the_rows_past_the_step_and_continues_the_time(experiment):
    with Logger(experiment, 10, out=io.StringIO()) as logger:
        logger.earlier = 100.0
        for step in (2, 4, 6):
            logger.log(step, {"loss": float(step)})
    with Logger(experiment, 10, step=4, out=io.StringIO()) as logger:
        logger.log(6, {"loss": 60.0})
    assert losses(experiment) == [(2, 2.0), (4, 4.0), (6, 60.0)]
    seconds = [row["seconds"] for row in rows(experiment)]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 100


def test_a_fresh_start_in_an_old_folder_begins_anew(experiment):
    for value in (1.0, 2.0):
        with Logger(experiment, 10, step=0, out=io.StringIO()) as logger:
            logger.log(1, {"loss": value})
    assert losses(experiment) == [(1, 2.0)]


@pytest.mark.parametrize(
    "damage", ['{"step": 2, "seconds": 1, "lo', "\x00\x00", "[]", '{"loss": 1.0}', '{"step": "2"}']
)
def test_a_damaged_line_is_dropped_and_forbids_no_resume(experiment, damage):
    experiment.run_folder.mkdir()
    whole = '{"step": 1, "seconds": 1, "loss": 3.0}\n'
    for text in (whole + damage, damage + "\n" + whole, whole + damage + "\n" + whole.replace("1,", "3,", 1)):
        (experiment.run_folder / "metrics.jsonl").write_text(text)
        assert losses(experiment)[0] == (1, 3.0)
        with Logger(experiment, 10, step=2, out=io.StringIO()) as logger:
            logger.log(3, {"loss": 2.0})
        assert losses(experiment) == [(1, 3.0), (3, 2.0)]
        assert "dropped 1 damaged" in (experiment.run_folder / "log.txt").read_text()


def test_other_ranks_write_nothing(experiment):
    with Logger(experiment, 10, rank=1, out=io.StringIO()) as logger:
        logger.log(1, {"loss": 1.0})
        logger.set_step(2)
        logger.info("hello")
    assert not experiment.run_folder.exists()


def test_without_a_terminal_there_is_a_plain_line_per_row(experiment):
    out = io.StringIO()
    with Logger(experiment, 10, out=out) as logger:
        logger.set_step(1)
        logger.log(2, {"loss": 3.0, "fine_over_coarse": 0.9, "waiting": 0.25, "lr_llm": 1e-5})
        logger.info("2 of 300 samples were bad: [truncated]")
    assert out.getvalue().splitlines() == [
        "small 2/10  loss 3.0000  fine/coarse 0.900  waiting 25%",
        "2 of 300 samples were bad: [truncated]",
    ]
    assert "[truncated]" in (experiment.run_folder / "log.txt").read_text()


def test_on_a_terminal_there_is_a_bar(experiment, monkeypatch):
    class Watched(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Watched()
    with Logger(experiment, 10, out=out) as logger:
        logger.log(3, {"loss": 3.0})
        logger.set_step(4)
    assert "4/10" in out.getvalue()
    assert "loss 3.0000" in out.getvalue()


def test_the_summary_says_how_it_ended(experiment):
    with Logger(experiment, 10, data_hash="d4", out=io.StringIO()) as logger:
        logger.log(2, {"loss": 3.0, "val_loss": 4.0})
        logger.log(4, {"loss": 2.0, "val_loss": 5.0})
        logger.log(6, {"loss": float("nan")})
        logger.close("stopped", reason="SIGTERM")
    summary = json.loads((experiment.run_folder / "run_summary.json").read_text())
    assert summary["best"] == {"loss": {"value": 2, "step": 4}, "val_loss": {"value": 4, "step": 2}}
    assert (summary["final"]["loss"], summary["final"]["val_loss"]) == (2, 5)
    assert (summary["status"], summary["step"], summary["reason"]) == ("stopped", 6, "SIGTERM")
    assert (summary["data_hash"], summary["experiment_hash"]) == ("d4", experiment.hash)
    assert summary["versions"].items() >= versions(["torch", "no-such-package"]).items()
    assert summary["commit"] == commit()
    assert summary["wall_seconds"] >= 0


def test_an_error_is_in_the_summary(experiment):
    with pytest.raises(ZeroDivisionError), Logger(experiment, 10, out=io.StringIO()):
        _ = 1 / 0
    summary = json.loads((experiment.run_folder / "run_summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "ZeroDivisionError: division by zero")


def test_redact_hides_secrets_and_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-value")
    assert redact("/home/someone/shards") == "~/shards"
    assert redact("/home/someone_else/shards") == "/home/someone_else/shards"
    assert redact({"a": ["x s3cr3t-value y", 3, None]}) == {"a": [f"x {HIDDEN} y", 3, None]}
    assert (
        redact("https://me:pass@host/a.tar?X-Amz-Signature=abc&part=1")
        == f"https://{HIDDEN}@host/a.tar?{HIDDEN}&part=1"
    )
    assert redact("hf_" + "a" * 30) == HIDDEN


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"
SECRETS = ["ghp_" + "a1" * 18, "github_pat_" + "b2" * 20, "sk-" + "c3" * 20, "sk-proj-" + "d4" * 20, JWT, "e5" * 20,
           "AKIA" + "F6" * 8, "ASIA" + "F6" * 8, "glpat-" + "g7" * 10, "xoxb-1234567890-abc"]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_redact_knows_a_secret_by_its_form(secret):
    assert redact(f"key {secret}, and more") == f"key {HIDDEN}, and more"
    assert redact(f"Authorization: Bearer {secret}").endswith(HIDDEN)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://me:p@ss:w@rd@host/a.tar", f"https://{HIDDEN}@host/a.tar"),
        ("s3://bucket/a?password=hunter2&part=1", f"s3://bucket/a?{HIDDEN}&part=1"),
        ("https://host/a?x=1&passwd=a&auth_token=b", f"https://host/a?x=1&{HIDDEN}&{HIDDEN}"),
        ("WANDB_API_KEY='abcdefgh'", f"{HIDDEN}'"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nrest", f"{HIDDEN}\nrest"),
    ],
)
def test_redact_knows_a_secret_by_its_place(text, hidden):
    assert redact(text) == hidden


@pytest.mark.parametrize(
    "text",
    ["data.max_tokens=48", "tokenizer: /models/SmolLM2", "https://host/a.tar?design=2", "mask-1234567890-1234567890-12",
     "key: value", "step-00000100", "0123456789abcdef", "https://host/path@2x.png"],
)  # fmt: skip
def test_redact_leaves_what_is_no_secret(text):
    assert redact(text) == text


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_API_KEY", "PGPASSWORD", "DB_PASS", "AWS_SECRETS", "TOKEN2", "apikey"])
def test_redact_knows_a_secret_by_a_word_of_its_name(monkeypatch, name):
    monkeypatch.setenv(name, "s3cr3t-value")
    assert redact("x s3cr3t-value y") == f"x {HIDDEN} y"


@pytest.mark.parametrize("name", ["TOKENIZER_DIR", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PASSAGE_FOLDER"])
def test_redact_leaves_words_that_only_begin_like_a_secret(monkeypatch, name):
    monkeypatch.setenv(name, "HuggingFaceTB/SmolLM2")
    assert redact({"llm": "HuggingFaceTB/SmolLM2"}) == {"llm": "HuggingFaceTB/SmolLM2"}


def test_wandb_gets_the_rows_but_no_secret_and_no_path(experiment, monkeypatch):
    """Offline, with the real client: everything it would send lies in its folder."""
    monkeypatch.setenv("SHARD_TOKEN", "s3cr3t-value")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(experiment.run_folder / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(experiment.run_folder / "config"))
    values = experiment.model_dump()
    values["logger"]["wandb"] = "offline"
    values["data"]["sources"]["clips"]["shards"] = "https://host/home/someone/s3cr3t-value/clips.tar"
    values["data"]["sources"]["clips"]["prompt"] = "/home/someone/s3cr3t-value"
    experiment = Experiment.model_validate(values)
    ids = []
    for step in (0, 2):
        with Logger(experiment, 10, step=step, out=io.StringIO()) as logger:
            logger.log(step + 2, {"loss": 3.25})
            ids.append(logger.wandb.id)
    assert ids[0] == ids[1], "a resumed run is the same run"
    wandb = experiment.run_folder / "wandb"
    sent = b"".join(file.read_bytes() for file in [*wandb.glob("*/*.wandb"), *wandb.glob("*/files/*")])
    assert b"lr_connector" in sent, "the settings are there"
    host = os.uname().nodename.encode()  # a short one is in random bytes by chance: look for it as a whole value
    hosts = [host] if len(host) > 6 else [bytes([len(host)]) + host, b'"' + host + b'"']
    for hidden in (b"s3cr3t-value", b"/home/someone", *hosts):
        assert hidden not in sent


def test_a_run_outlives_wandb(experiment, monkeypatch):
    """Its process gets the signals that SLURM sends to every process of a job."""
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(experiment.run_folder / variable))
    values = experiment.model_dump()
    values["logger"]["wandb"] = "offline"
    with Logger(Experiment.model_validate(values), 10, out=io.StringIO()) as logger:
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("wandb"):
                process.kill()
        for step in range(1, 4):
            logger.log(step, {"loss": 3.25})
            time.sleep(0.2)  # the first write to a dead process may succeed
    assert len(read_metrics(experiment.run_folder)) == 3
    assert json.loads((experiment.run_folder / "run_summary.json").read_text())["status"] == "finished"
    assert "the run continues without it" in (experiment.run_folder / "log.txt").read_text()
