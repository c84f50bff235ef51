"""Services of the system: a peer that comes back after a reboot. Begin with `managers.py:service_manager`."""
