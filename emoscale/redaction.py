"""Credentials: found in what a user gives, and taken out of what is written or shown."""

from __future__ import annotations

import os
import re

SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
)  # fmt: skip
"""Variables whose values are never shown."""
SHORTEST = 8
"""Letters of a value worth hiding: a shorter one would be hidden in ordinary words."""
HIDDEN = "***"
REMEDY = "leave them out; storage takes AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, from the environment"

_SCHEME = r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,15}:/{1,2}"  # a path library makes one slash of two
# A password may hold slashes, as keys of S3 do; what follows a colon is none where it is a port.
_USER = re.compile(rf"({_SCHEME})(?:[^/\s@'\"]{{1,500}}|[^/\s@:'\"]{{1,200}}:(?!\d{{1,5}}(?:/|$))[^\s@'\"]{{1,500}})@")
_QUERY = re.compile(rf"({_SCHEME}[^\s?'\"]{{0,500}}\?)(?=[^\s'\"=]{{0,200}}=)[^\s'\"]*")
_NAMED = re.compile(
    r"(?i)((?:secret|passw(?:or)?d|session_token|api_?key|access_?key|credential|authorization)\w{0,40}['\"]?\s*[=:]\s*)"
    r"(['\"])?(?(2)[^'\"]+|(?:(?:bearer|basic)\s+)?[^\s'\",;&}]+)"
)
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")


def redact(text: str) -> str:
    """Give a text without user names, passwords and queries of URLs, AWS keys, and the values of secret variables."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))
    return _KEY_ID.sub(HIDDEN, _NAMED.sub(rf"\1\2{HIDDEN}", text))


def holds_credentials(text: str) -> bool:
    """Whether a text holds a URL with a user or a query, an AWS key, or the value of a secret variable."""
    return redact(text) != text
