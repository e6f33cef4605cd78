"""Generation: an engine that continues many prompts at once, and the text of its tokens."""

from models.generation.engine import Engine
from models.generation.requests import Completion, Event, Finish, Request, Sampling
from models.generation.snapshots import Snapshot
from models.generation.text import StopStrings, TextStream, stream_text

__all__ = [
    "Completion",
    "Engine",
    "Event",
    "Finish",
    "Request",
    "Sampling",
    "Snapshot",
    "StopStrings",
    "TextStream",
    "stream_text",
]
