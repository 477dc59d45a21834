"""Settings of the commands, their YAML and their flags."""
