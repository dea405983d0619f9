"""What is started from the Prefect UI or by a schedule: flows with forms, work pools, reruns that are compared."""
