"""Figures and pages of testbeds."""
