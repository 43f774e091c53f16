"""Which endpoints may be called at all, before a policy chooses among them."""

from __future__ import annotations

from meshlb.topology.eligibility import Eligibility, Standing, judge

__all__ = ["Eligibility", "Standing", "judge"]
