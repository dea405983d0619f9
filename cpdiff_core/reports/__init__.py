"""Tables and the one HTML page of an experiment."""
