"""Exit statuses of a process of a run; docs/preemption.md says what becomes of them under a launcher."""

OK = 0
"""All that was asked for is done."""
BUG = 1
"""A traceback; also what a launcher makes of every status of a rank but 0."""
USER = 2
"""Something a person can put right: one sentence says what."""
HUNG = 70
"""The watchdog ended this rank: `hang.json` names who hangs (EX_SOFTWARE of sysexits)."""
PREEMPTED = 75
"""Asked to leave by a signal, saved and left: start it again (EX_TEMPFAIL of sysexits)."""
INTERRUPTED = 130
"""Ctrl-C."""
