"""Keeps the Lab Streaming Layer of a test run on this machine, and apart from that of other runs."""

import uuid

CONFIG = f"""[ports]
IPv6=disable
[multicast]
ResolveScope=machine
ListenAddress=127.0.0.1
AddressesOverride={{127.0.0.1}}
Interfaces={{127.0.0.1}}
[lab]
KnownPeers={{127.0.0.1}}
SessionID=test-{uuid.uuid4().hex}
[log]
level=-3
"""
