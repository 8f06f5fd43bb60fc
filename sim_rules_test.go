package main

import (
	"slices"

	"millrace/protocol"
	"millrace/protocol/client"
)

// This file breaks the rules of clients around the Outbox, which keeps them: by calling its numbers something else
// on the wire, and by keeping sends from it.

// breakRules prepares a connection.
func (c *simClient) breakRules(first uint64) {
	switch c.sim.mut {
	case "a client counts on by itself from one":
		c.count = 1
	case "a resend gets a new number":
		c.count = first
		for _, it := range c.disk.items {
			if it.Seq != 0 {
				c.disk.wire[it.Seq] = c.count
				c.count++
			}
		}
	case mutNoSpan:
		c.aside = nil
		for _, it := range c.disk.items {
			if it.Seq != 0 {
				c.aside = append(c.aside, &it)
				c.outbox.Received(it.Seq)
			}
		}
	}
}

// taken is how many numbers of the connection's block are used up before the Outbox counts.
func (c *simClient) taken() uint64 {
	if c.sim.mut == "a resend gets a new number" {
		return c.count - c.first
	}
	return 0
}

func (c *simClient) wireOf(it *client.Item) uint64 {
	if w, ok := c.disk.wire[it.Seq]; ok {
		return w
	}
	if c.sim.mut == "a client counts on by itself from one" {
		c.disk.wire[it.Seq] = c.count
		c.count++
		return c.count - 1
	}
	return it.Seq
}

// numberOf is the Outbox's number of an open send.
func (c *simClient) numberOf(wire uint64) uint64 {
	for _, it := range c.disk.items {
		if w, ok := c.disk.wire[it.Seq]; ok && w == wire {
			return it.Seq
		}
	}
	return wire
}

// writeAside writes what was open when the connection began, behind something new.
func (c *simClient) writeAside(behind bool) {
	if !behind || len(c.aside) == 0 {
		return
	}
	for _, it := range c.aside {
		c.write(it)
	}
}

func (c *simClient) answeredAside(seq uint64, a protocol.Answer) bool {
	i := slices.IndexFunc(c.aside, func(it *client.Item) bool { return it.Seq == seq })
	if i < 0 {
		return false
	}
	if it := c.aside[i]; a.Code == protocol.OK {
		c.aside = slices.Delete(c.aside, i, i+1)
		c.disk.end(it)
		c.sim.truth.answered(it.Text, a)
	}
	return true
}
