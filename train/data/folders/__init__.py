"""Folders of class folders."""
