"""Request -> Plan -> stream of Steps -> Result."""
