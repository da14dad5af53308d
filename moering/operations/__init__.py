"""Operations: scaling, draining and restarting, decided by the coordinator, carried out by launchers and processes."""
