"""Fitting the adapter while everything else stays frozen."""
