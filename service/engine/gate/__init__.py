"""The engine's side of the gate: settings, parameters of a batch's rows, reported and logged gate rows."""
