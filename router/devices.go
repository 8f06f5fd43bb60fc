package router

import "strings"

// devices keeps the common device names of a shard once, so that records name them by a byte and Locate
// returns them without allocating. A name that no route uses gives its place to the next.
type devices struct {
	names []string
	uses  []uint32 // routes that use the name
}

const (
	// maxDeviceNames: clients use a handful ("default", "phone", …). Where they make up random ones, this many
	// strings a shard are all that it costs.
	maxDeviceNames = 32

	// deviceInRecord stands for a name that is not kept.
	deviceInRecord = 0xff
)

// acquire returns the number of a name for one more route, or deviceInRecord.
func (d *devices) acquire(name string) uint8 {
	unused := -1
	for i := range d.names {
		switch {
		case d.names[i] == name:
			d.uses[i]++
			return uint8(i)
		case d.uses[i] == 0:
			unused = i
		}
	}
	if unused >= 0 {
		d.names[unused], d.uses[unused] = strings.Clone(name), 1
		return uint8(unused)
	}
	if len(d.names) == maxDeviceNames {
		return deviceInRecord
	}
	d.names = append(d.names, strings.Clone(name))
	d.uses = append(d.uses, 1)
	return uint8(len(d.names) - 1)
}

// release takes one route back.
func (d *devices) release(code uint8) {
	if code != deviceInRecord {
		d.uses[code]--
	}
}

func (d *devices) bytes() int {
	n := 16*cap(d.names) + 4*cap(d.uses)
	for _, name := range d.names {
		n += len(name)
	}
	return n
}
