"""Anatomies of models by structure: which module plays which role, in classes that are not ours."""
