from __future__ import annotations

from meshlb.simulate.timeline import START, Timeline


def test_events_happen_in_the_order_of_their_times_and_then_of_their_setting():
    timeline, seen = Timeline(), []
    for name, delay in (("c", 2.0), ("a", 1.0), ("d", 2.0), ("b", 1.0)):
        timeline.at(START + delay, lambda name: seen.append((name, timeline())), name)
    timeline.run()
    assert seen == [("a", START + 1), ("b", START + 1), ("c", START + 2), ("d", START + 2)]


def test_deadlines_are_merged_with_the_other_events():
    timeline, seen = Timeline(), []
    timeline.deadline(START + 1.0, seen.append, "deadline 1")
    timeline.deadline(START + 3.0, seen.append, "deadline 3")
    timeline.at(START + 2.0, seen.append, "event 2")
    timeline.at(START + 4.0, seen.append, "event 4")
    timeline.run()
    assert seen == ["deadline 1", "event 2", "deadline 3", "event 4"]


def test_it_stops_where_it_is_told_to_and_goes_on_from_there():
    timeline, seen = Timeline(), []
    timeline.at(START + 1.0, seen.append, "early")
    timeline.deadline(START + 5.0, seen.append, "deadline")
    timeline.at(START + 6.0, seen.append, "late")
    timeline.run(START + 4.0)
    assert seen == ["early"]
    timeline.run()
    assert seen == ["early", "deadline", "late"]


def test_it_serves_as_a_control_loop():
    timeline, seen = Timeline(), []
    timeline.call_later(1.0, lambda: seen.append("later"))
    assert timeline.call_soon(seen.append, "soon")
    timeline.run()
    assert seen == ["soon", "later"]
    assert timeline() == START + 1.0


def test_what_an_event_sets_for_now_happens_before_time_goes_on():
    timeline, seen = Timeline(), []
    timeline.at(START + 1.0, lambda _: timeline.call_soon(seen.append, timeline.now), None)
    timeline.at(START + 1.5, seen.append, "next")
    timeline.run()
    assert seen == [START + 1.0, "next"]
