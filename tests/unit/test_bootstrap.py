"""How models are loaded, whatever they are."""

from __future__ import annotations

import gc

import pytest

from router.bootstrap import load_base_model


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_looked_for_while_a_base_model_is_loaded_and_then_as_before(
    monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    seen = []

    def load(name: str, **_: object) -> None:
        seen.append((name, gc.isenabled()))
        if name == "broken":
            raise OSError("not there")

    monkeypatch.setattr("router.backends.language_model.load_language_model", load)
    (gc.enable if enabled else gc.disable)()
    try:
        load_base_model("small")
        assert gc.isenabled() is enabled
        with pytest.raises(OSError, match="not there"):
            load_base_model("broken")
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert seen == [("small", False), ("broken", False)]
