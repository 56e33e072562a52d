"""A whole run in virtual time: the coordinator's real lifecycle code, without its processes and sockets.

    run = Simulation(config=..., physics=..., players=..., folder=..., seed=bytes(32))
    run.play()
    outcome = run.outcome()
    run.office.close()

Volunteers lease, train, claim, sketch and upload; auditors replay; rounds close and merge; owners are promoted and
banned: all by the functions that the control process calls, on a real database, signed with real keys. What a unit's
training gives comes from a `Physics`: `RealPhysics` trains tiny units and merges real containers, `MeasuredPhysics`
draws from measured probabilities, so that thousands of units take seconds. Everything follows from one seed.
"""
