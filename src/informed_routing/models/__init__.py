"""The base model, as it is: where its parts are, how they are called, and how it is recognised."""
