"""Helpers of the tests: real servers, a real Consul, waiting with a deadline.

Empty on purpose: the servers import from here too, and start fast.
"""
