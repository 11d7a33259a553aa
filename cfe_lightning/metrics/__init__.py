"""Pure metrics over explanations."""
