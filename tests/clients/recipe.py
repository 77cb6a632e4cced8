"""What the Python programs here share: the transcript, and how a pool gets its handles."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time

# A pool lives for this many lifetimes of a handle, and some more.
LIFETIMES = 3
# Where nothing expires, less may do.
SECONDS = float(os.environ.get("CLIENTS_POOL_SECONDS", "7"))


def say(check, value="ok"):
    """One line of the transcript: what must be the same direct and through the door."""
    print(f"{check}: {value}", flush=True)


def note(text):
    """What may differ. It is shown beside the verdict."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def digest(parts):
    """The SHA-256 of a sequence of byte strings."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


# [recipe]
TOKEN_COMMAND = os.environ.get(
    "CLIENTS_TOKEN_COMMAND", "credbroker --output json handle issue main_db"
)


def token():
    """A new handle. Called for each new connection, so that none is opened with an old one."""
    printed = subprocess.run(shlex.split(TOKEN_COMMAND), check=True, capture_output=True)
    return json.loads(printed.stdout)["token"]


# [end]


def outlive(query, lost):
    """Asks `query` until more than three lifetimes have passed. It gives the backend's pid.

    A statement that runs at the very moment in which its handle ends is cut, and raises `lost`:
    it is asked again once, as an application would.
    """
    backends, answers, cut = [], 0, 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            backend = query()
        except lost as error:
            cut += 1
            note(f"cut in the middle: {type(error).__name__}")
            backend = query()
        answers += 1
        if backend not in backends:
            backends.append(backend)
        time.sleep(0.05)
    finish(len(backends), answers, cut)


def finish(backends, answers, cut):
    """The verdict on a pool, the same words in every language."""
    replaced = os.environ.get("CLIENTS_EXPIRES") == "1"
    enough = backends > LIFETIMES if replaced else backends == 1
    say("pool: outlives three lifetimes", "ok" if enough and answers > 5 else f"{backends} backends, {answers} answers")
    say("pool: errors that a retry does not mend", 0)
    note(f"{backends} backends, {cut} errors seen")
