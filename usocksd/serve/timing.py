"""All time limits of master and workers, and a few numbers: one value, so that tests can choose others."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Timing:
    """Times are in seconds."""

    ready_within: float = 60.0
    """A generation gets ready within this time, with a cold cache and a million rules."""
    heartbeat: float = 0.5
    """Between a worker's signs of life"""
    suspect_after: float = 2.0
    """Silent for this long, a worker is suspected to hang, and verbs are not passed on to it."""
    hung_after: float = 10.0
    """Silent for this long, a worker is killed."""
    look_every: float = 0.5
    """The master looks for silent workers."""
    backoff: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
    """Before a worker that has died is replaced: the first time, the second, and so on"""
    backoff_alone: float = 0.5
    """The most of that pause while no worker serves"""
    steady_after: float = 5.0
    """A worker that has lived for this long has not failed."""
    last_words: float = 5.0
    """A worker that has been told to end, or has closed its channel, is killed after this time."""
    send_within: float = 2.0
    """A worker that reads nothing for this long is skipped."""
    answer_within: float = 1.0
    """A worker that has not answered a question by then is left out."""
    list_within: float = 5.0
    """The same for a list of its connections: 20,000 take a busy worker seconds."""
    verb_within: float = 60.0
    """The same for a verb of the daemon's own"""
    rates_over: float = 0.5
    """Rates in `status` are over this time."""
    status_every: float = 5.0
    """The service manager is told the state, if it has changed."""
    patience: float = 30.0
    """A reload waits this long for the oldest generation to drain."""
    return_again: float = 5.0
    """Until the configuration before a trial is tried again"""
    answered_after: float = 0.5
    """Between a reload and the master's upgrade, so that the verb that has asked for the reload gets its answer."""
    open_again: float = 1.0
    """Until an endpoint that could not be opened is tried again"""
    session_ends: float = 0.5
    """A session that was told to stop writes its record and closes."""
    shed_after: float = 60.0
    """At the descriptor limit, connections that were silent for this long make room."""
    shed_at_once: int = 32
    """How many of them"""
