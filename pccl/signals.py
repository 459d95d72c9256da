"""Signals that wait while a caller's thread does what must not be done by half."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

try:
    import _signal as signals  # what `signal` wraps: its enums take longer than a small call's arithmetic
except ImportError:
    import signal as signals

_NAMES = "INT TERM HUP QUIT USR1 USR2 ALRM VTALRM PROF CHLD WINCH CONT TSTP TTIN TTOU IO URG PIPE"
SIGNALS = tuple(int(getattr(signals, f"SIG{name}")) for name in _NAMES.split() if hasattr(signals, f"SIG{name}"))
"""Those for which programs have handlers; torch's DataLoader has one for SIGCHLD, which raises."""


class SignalsHeld:
    """Python's signal handlers run between any two instructions of the main thread, and may raise: have them wait for a while."""

    _now: ClassVar[list[SignalsHeld]] = []
    """Those of the main thread, the outermost first"""
    _found: ClassVar[list[Any]] = []
    """The handlers of all SIGNALS, as they were found last"""
    _python: ClassVar[list[tuple[int, Any]]] = []
    """Those of them that are Python's to run"""

    @classmethod
    def forked(cls) -> None:
        """In a child the main thread is the one that forked: none of these blocks will end."""
        while cls._now:
            held = cls._now[-1]
            held._caught.clear()
            held._give_back()

    def __enter__(self) -> None:
        self._caught: list[int] = []
        self._handlers: list[tuple[int, Any]] = []
        if threading.current_thread() is threading.main_thread():
            found = list(map(signals.getsignal, SIGNALS))
            if found != self._found:
                SignalsHeld._found = found
                SignalsHeld._python = [(n, handler) for n, handler in zip(SIGNALS, found, strict=True) if callable(handler)]
            self._handlers = self._python.copy()
            self._now.append(self)
            try:
                for number, _ in self._handlers:
                    signals.signal(number, self._catch)
            except BaseException:  # of a handler whose turn had not come
                self._give_back()
                raise

    def _catch(self, number: int, frame: object) -> None:
        self._caught.append(number)

    def __exit__(self, *exc: object) -> None:
        self._give_back()

    def _give_back(self) -> None:
        """Install the handlers again, all of them, and run those that were called, all of them, whatever they raise."""
        try:
            while self._handlers:
                signals.signal(*self._handlers[-1])
                self._handlers.pop()
            if self in self._now:
                self._now.remove(self)
            while self._caught:
                signals.raise_signal(self._caught.pop(0))
        finally:
            if self._handlers or self._caught:
                self._give_back()
