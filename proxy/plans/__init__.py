"""Plans as the proxy asks for them: by the rules, beside the models that are loaded."""
