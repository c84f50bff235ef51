"""Steps of a stage are bounded: otherwise a round would count more than others accept."""

from swarmtrain.protocol.pipeline.ledger import Key, LedgerLimits, StageLedger, TakeStep
from swarmtrain.run import RunFile


def test_a_rounds_tokens_stay_within_what_others_accept() -> None:
    run = RunFile.model_validate(
        {
            "run": {"total_tokens": 10**9},
            "model": {"num_layers": 2},
            "inner": {"batch_sequences": 16},
            "merge": {"inner_steps": 2},
            "pipeline": {"stages": 2},
        }
    )
    tokens = run.microbatch_sequences * run.model.context_tokens
    ledger = StageLedger(LedgerLimits(batch_tokens=run.tokens_per_step))  # as StageReplica makes it
    steps: list[int] = []
    sequence = 0

    def work(driver: str, now: float, acknowledged: bool = True) -> bool:
        nonlocal sequence
        key = Key(driver, sequence, 0)
        sequence += 1
        if ledger.ask(key, "tail", tokens, now).answer != "work":
            return False
        assert ledger.begin(key, "tail") is not None
        ledger.computed(key, "tail", now)
        if acknowledged:
            ledger.acknowledge(key, 1.0, now)
        return True

    def due(now: float) -> None:
        while (what := ledger.due(now)) is not None:
            steps.extend([what.tokens] if isinstance(what, TakeStep) else [])

    work("hanging", 0.0, acknowledged=False)
    now = 0.0
    while now < 30.0:  # two other drivers go on, an answer every 0.1 s
        for driver in ("d", "e"):
            work(driver, now)
            due(now)
        now += 0.2
    a_round, largest = 0, 0
    for each in steps:
        a_round += each
        if a_round >= run.merge.inner_steps * run.tokens_per_step:
            largest, a_round = max(largest, a_round), 0
    print(tokens, run.tokens_per_step, steps)
    assert largest <= run.max_round_tokens, (largest, run.max_round_tokens)
