# SPDX-License-Identifier: BSD-3-Clause
"""``vhostsock probe``: a front-end that asks a back-end, anybody's, whether it keeps to the vhost-user document.

    target       the back-end: how to reach it, how it ends, whether it is still there
    connection   one connection to it: testing's front-end and driver, and a transcript of what was said
    traffic      a request that a device of some type understands, for the checks that need the rings to work
    check        what a check is, what it is given and what can become of it
    offer        what the back-end offers, by the names of the specifications
    the checks, each file a subject:
        negotiation, answers, memory, rings, formats, config, state, connections      a front-end that keeps the rules
        hostile_messages, hostile_rings                                               one that does not, and its driver
    table        all of them
    runner       runs them, each on a connection of its own, and says what became of the back-end
    report       for people and for programs
    command      the command line

A check takes nothing from the back-end's side of this library: what it expects is written from the document. It never fails for
what the document leaves open. Where a back-end may refuse or carry out, both pass; closing the connection is a way to refuse
("Communication": "it may also close the connection") for a message that breaks a rule, and a failure for one that breaks none.
"""
