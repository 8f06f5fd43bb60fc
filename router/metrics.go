package router

import "unsafe"

// Metrics emits what the table counts. It takes every shard's lock in turn, for reading.
func (t *Table) Metrics(emit func(name, help string, counter bool, value float64, labels ...string)) {
	c := t.total()
	emit("millrace_router_users", "Users with a route.", false, float64(c.users))
	emit("millrace_router_routes", "Routes: connected devices.", false, float64(c.routes))
	emit("millrace_router_bytes", "Memory of the route table.", false, float64(c.bytes))
	emit("millrace_router_binds_total", "Routes bound.", true, float64(c.binds))
	emit("millrace_router_stale_binds_total", "Binds refused because a later login held the route.", true, float64(c.staleBinds))
	emit("millrace_router_replaced_total", "Binds that replaced another connection of the same device.", true, float64(c.replaced))
	emit("millrace_router_unbinds_total", "Routes removed.", true, float64(c.unbinds))
	emit("millrace_router_stale_unbinds_total", "Unbinds ignored because the route belonged to another session.", true, float64(c.staleUnbinds))
	emit("millrace_router_stale_states_total", "State changes ignored because the route belonged to another session.", true, float64(c.staleStates))
	emit("millrace_router_rebuilds_total", "Shards whose index was built anew.", true, float64(c.rebuilds))
}

// total sums the shards, each consistent in itself.
func (t *Table) total() counts {
	sum := counts{bytes: uint64(unsafe.Sizeof(*t))}
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		c := s.counts
		c.bytes = uint64(s.index.bytes() + s.arena.bytes() + s.devices.bytes())
		s.mu.RUnlock()
		sum.add(&c)
	}
	return sum
}

func (c *counts) add(o *counts) {
	c.users += o.users
	c.routes += o.routes
	c.binds += o.binds
	c.staleBinds += o.staleBinds
	c.replaced += o.replaced
	c.unbinds += o.unbinds
	c.staleUnbinds += o.staleUnbinds
	c.staleStates += o.staleStates
	c.rebuilds += o.rebuilds
	c.bytes += o.bytes
}
