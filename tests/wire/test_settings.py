"""Settings of a round: sent by the server, overridden by a site, seeded by client and round."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord

from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError, WireError
from offsite_fl.wire.settings import (
    client_seed,
    server_round,
    tune_from_config,
    tune_of_round,
    tune_of_run,
    tune_to_config,
)


def test_settings_survive_the_wire() -> None:
    tune = TuneConfig(lr=3e-4, max_steps=7, lora_rank=4, lora_targets=("q_proj", "v_proj"), patience=None, device=None)
    record = ConfigRecord(tune_to_config(tune) | {"server-round": 2})
    record.count_bytes()  # Flower's own counter raises on empty texts
    back = tune_from_config(ConfigRecord.inflate(record.deflate()), {}, "a")
    assert back == TuneConfig(**(vars(tune) | {"seed": client_seed(0, 2, "a")}))


def test_a_site_overrides_what_is_its_own_business() -> None:
    config = tune_to_config(TuneConfig(batch_size=8))
    tune = tune_from_config(config, {"tune.batch-size": 2, "tune.device": "cpu", "partition-id": 0}, "a")
    assert (tune.batch_size, tune.device) == (2, "cpu")
    with pytest.raises(ConfigError, match=r"tune\.lora-rank can't be set for one site"):
        tune_from_config(config, {"tune.lora-rank": 2}, "a")
    with pytest.raises(ConfigError, match="did you mean 'batch-size'"):
        tune_from_config(config, {"tune.batchsize": 2}, "a")


def test_a_site_may_take_a_smaller_rank_at_the_run_s_scale() -> None:
    config = tune_to_config(TuneConfig(lora_rank=8, lora_alpha=32.0))
    tune = tune_from_config(config, {"tune.lora-rank": 2, "tune.batch-size": 1}, "a")
    assert (tune.lora_rank, tune.lora_alpha, tune.batch_size) == (2, 8.0, 1)  # 32 / 8 is 8 / 2
    assert tune_of_run(config).lora_rank == 8
    for rank in (0, 9):
        with pytest.raises(ConfigError, match=f"tune.lora-rank = {rank} of this site must lie from 1 to 8"):
            tune_from_config(config, {"tune.lora-rank": rank}, "a")
    for name in ("alpha", "dropout", "targets", "train", "fresh"):
        with pytest.raises(ConfigError, match=f"tune.lora-{name} can't be set for one site"):
            tune_from_config(config, {f"tune.lora-{name}": 1}, "a")


def test_the_proximal_weight_of_fedprox_wins() -> None:
    config = tune_to_config(TuneConfig(proximal_mu=0.5)) | {"proximal-mu": 0.01}
    assert tune_from_config(config, {}, "a").proximal_mu == 0.01
    with pytest.raises(WireError, match="proximal-mu must be a number"):
        tune_from_config(config | {"proximal-mu": "much"}, {}, "a")


def test_seeds_differ_by_run_round_and_client() -> None:
    seeds = {client_seed(run, r, c) for run in range(3) for r in range(3) for c in ("a", "b", "c")}
    assert len(seeds) == 27 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_schedule_spans_the_rounds() -> None:
    tune = TuneConfig(schedule="cosine", schedule_steps=10, max_steps=4)
    assert [tune_of_round(tune, r).schedule_offset for r in (1, 2, 3, 4)] == [0, 4, 8, 10]
    alone = TuneConfig(schedule="cosine", max_steps=4)
    assert tune_of_round(alone, 3) is alone


def test_one_order_of_the_data_where_a_schedule_spans_the_rounds() -> None:
    spanning = tune_to_config(TuneConfig(schedule_steps=10, max_steps=4))
    assert len({tune_from_config(spanning | {"server-round": r}, {}, "a").seed for r in (1, 2, 3)}) == 1
    alone = tune_to_config(TuneConfig(max_steps=4))
    assert len({tune_from_config(alone | {"server-round": r}, {}, "a").seed for r in (1, 2, 3)}) == 3


@pytest.mark.parametrize("value", ["1", True, -1, 1.0])
def test_rounds_are_whole_numbers(value: object) -> None:
    with pytest.raises(WireError):
        server_round({"server-round": value})
