from __future__ import annotations

import pytest

from emoscale.redaction import HIDDEN, holds_credentials, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://ann:hunter22@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIAABCDEFGHIJKLMNOP@bucket/x", "s3://***@bucket/x"),
        ("could not reach http://ann:hunter22@proxy:3128/ in time", "could not reach http://***@proxy:3128/ in time"),
        ("https:/ann:hunter22@host/film.mp4", "https:/***@host/film.mp4"),
        ("get https://host/x?X-Amz-Signature=abc&X-Amz-Credential=d failed", "get https://host/x?*** failed"),
        ("https://host/x?token=abc", "https://host/x?***"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI other", "AWS_SECRET_ACCESS_KEY=*** other"),
        ("{'aws_secret_access_key': 'wJalrXUtnFEMI'}", "{'aws_secret_access_key': '***'}"),
        ("password: hunter22", "password: ***"),
        ("key AKIAABCDEFGHIJKLMNOP", "key ***"),
    ],
)
def test_credentials_are_taken_out(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert holds_credentials(text)
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "", "s3://bucket/prefix", "s3://bucket/prefix@v1/x", "file:///a@b/c", "file:///folder", "bert-base-uncased", "owner/model@main", "a/film@night.mp4", "optim.lr=3e-4",
        "https://huggingface.co/owner/model", "tokenizer: [MASK]?", "what? why=because", "secret of the film", "{text} I am [MASK] .", "ann@example.org",
    ],
)  # fmt: skip
def test_what_holds_none_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
    assert not holds_credentials(text)


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert redact("a wJalrXUtnFEMI/K7MDENG b short") == f"a {HIDDEN} b short"


def test_a_long_text_takes_no_longer_than_its_length() -> None:
    for text in ("a://" * 20_000, "a://b?" * 10_000, "password" * 10_000, "s3://" + "x" * 100_000, "?=" * 40_000):
        redact(text)
